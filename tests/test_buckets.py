from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import numpy as np
import pytest

from wan22_jax.data.buckets import assign_buckets, make_rule
from wan22_jax.data.video import MediaInfo
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket


def media(width_px, height_px, frames=1, fps=24):
    return MediaInfo(width_px, height_px, frames, Fraction(fps), is_image=frames == 1)


def rule_of(**keys):
    return make_rule(source="d.toml", **{"resolutions": None, "frame_buckets": [1], **keys})


def assign(info, rule):
    return assign_buckets(info, rule, source="a.mp4")


AR = {"enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0, "num_ar_buckets": 7}


def test_sizes_equal_diffusion_pipes_table():
    rule = rule_of(resolutions=[512], **AR)
    assert [ratio for ratio, _ in rule.groups[0]] == [0.5, 0.63, 0.794, 1.0, 1.26, 1.587, 2.0]
    sizes = "352x736 416x640 448x576 512x512 576x448 640x416 736x352"
    assert [str(bucket) for bucket in rule.buckets] == [f"{size}x1" for size in sizes.split()]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1280, 720), (1280, 704)), ((1920, 1080), (1280, 704)), ((550, 1000), (704, 1280))],
)
def test_a_pair_counts_by_its_area(size, expected):
    rule = rule_of(resolutions=[[1280, 720]], enable_ar_bucket=True, ar_buckets=[0.55, 1, [16, 9]])
    assert assign(media(*size), rule) == (Bucket(*expected, 1),)


def test_without_ar_buckets_everything_is_square():
    rule = rule_of(resolutions=[512], frame_buckets=[33])
    assert rule.buckets == (Bucket(512, 512, 1), Bucket(512, 512, 33))
    assert assign(media(1280, 720, 100), rule) == (Bucket(512, 512, 33),)


def test_nearest_ratio_is_by_logarithm():
    rule = rule_of(resolutions=[512], enable_ar_bucket=True, ar_buckets=[0.5, 2.0])
    # 1.1 is nearer to 0.5 by difference (0.6 against 0.9) and to 2 by ratio
    assert assign(media(1100, 1000), rule) == (Bucket(736, 352, 1),)


@pytest.mark.parametrize(
    ("frames", "fps", "expected"), [(33, 24, 33), (80, 24, 33), (100, 24, 81), (42, 30, 33)]
)
def test_longest_frame_bucket_that_fits(frames, fps, expected):
    rule = rule_of(resolutions=[512], frame_buckets=[33, 81])
    assert assign(media(64, 64, frames, fps), rule)[0].frames == expected


@pytest.mark.parametrize(("frames", "fps", "at_24"), [(32, 24, 32), (41, 30, 32), (25, 30, 20)])
def test_too_short_is_said_with_numbers(frames, fps, at_24):
    rule = rule_of(resolutions=[512], frame_buckets=[33, 81])
    with pytest.raises(BadInput, match=f"a.mp4: too short: {at_24} frames at 24 fps.* needs 33"):
        assign(media(64, 64, frames, fps), rule)


def test_images_and_videos_do_not_share_buckets():
    rule = rule_of(resolutions=[512], frame_buckets=[33])
    assert assign(media(64, 64), rule)[0].frames == 1
    with pytest.raises(BadInput, match="no bucket takes videos"):
        assign(media(64, 64, 40), rule_of(resolutions=[512]))
    with pytest.raises(BadInput, match="no bucket takes images"):
        assign(media(64, 64), rule_of(size_buckets=[[512, 512, 33]]))


def test_each_resolution_is_a_group():
    rule = rule_of(resolutions=[512, 256, 256])
    assert assign(media(64, 64), rule) == (Bucket(256, 256, 1), Bucket(512, 512, 1))


def diffusion_pipes_bucket(width, height, at_24, side, ratios, lengths):
    """Its bucket for one file and resolution, written anew from its description; None: dropped."""
    errors = np.abs(np.log(width / height) - np.log(np.array(ratios)))
    ratio = ratios[int(np.argmin(errors))]
    area = side**2
    wide = np.sqrt(area * ratio)
    size = [
        int((Decimal(float(x)) / 32).quantize(Decimal(1), ROUND_HALF_EVEN)) * 32
        for x in (wide, area / wide)
    ]
    fitting = [length for length in sorted({1, *lengths}) if length <= at_24]
    if not fitting or (at_24 > 1 and fitting[-1] == 1):
        return None
    return (*size, fitting[-1])


def test_two_thousand_random_files_go_where_diffusion_pipe_puts_them():
    rng = np.random.default_rng(0)
    rates = [Fraction(24000, 1001), *map(Fraction, (8, 12, 16, 24, 25, 30, 50, 60, 120))]
    dropped, seen = 0, set()
    for number in range(2000):
        if number % 20 == 0:
            sides = sorted({int(x) * 32 for x in rng.integers(4, 40, 3)})
            low, high = np.round(np.exp([rng.uniform(-1.5, -0.1), rng.uniform(0.1, 1.5)]), 3)
            count = int(rng.integers(1, 12))
            lengths = [int(4 * n + 1) for n in rng.integers(1, 31, 3)]
            ratios = sorted({round(x, 3) for x in np.geomspace(low, high, count).tolist()})
            rule = rule_of(
                resolutions=sides,
                frame_buckets=lengths,
                enable_ar_bucket=True,
                min_ar=float(low),
                max_ar=float(high),
                num_ar_buckets=count,
            )
        width, height = (int(x) for x in np.exp(rng.uniform(np.log(64), np.log(4096), 2)))
        fps, frames = rates[rng.integers(len(rates))], int(rng.integers(2, 600))
        is_image = rng.random() < 0.2
        at_24 = 1 if is_image else int(frames * 24 / fps)
        info = media(width, height) if is_image else media(width, height, frames, fps)
        expected = [diffusion_pipes_bucket(width, height, at_24, r, ratios, lengths) for r in sides]
        if None in expected:
            dropped += 1
            with pytest.raises(BadInput, match="too short"):
                assign(info, rule)
            continue
        assert assign(info, rule) == tuple(dict.fromkeys(Bucket(*x) for x in expected))
        seen.update(expected)
    assert dropped > 50
    assert len(seen) > 1000


@pytest.mark.parametrize(
    ("sizes", "info", "expected"),
    [  # the three cases that diffusion-pipe gets wrong
        ([[512, 512, 33], [512, 512, 1]], media(64, 64), (512, 512, 1)),
        (
            [[1280, 704, 121], [704, 1280, 49]],
            media(1280, 704, 121),
            (1280, 704, 121),
        ),
        (
            [[640, 480, 1], [480, 640, 1], [512, 512, 33], [640, 384, 81]],
            media(480, 640),
            (480, 640, 1),
        ),
        ([[512, 512, 33], [512, 512, 81]], media(64, 64, 100), (512, 512, 81)),
        ([[1280, 704, 121], [704, 1280, 49]], media(1280, 704, 60), (704, 1280, 49)),
    ],
)
def test_size_buckets_keep_their_own_ratio(sizes, info, expected):
    assert assign(info, rule_of(size_buckets=sizes)) == (Bucket(*expected),)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resolutions": [512], "frame_buckets": [32]}, "frame_buckets: 32 frames is not 4n"),
        ({"size_buckets": [[500, 512, 33]]}, "size_buckets: width 500 .*; use 512"),
        ({"size_buckets": [[512, 512, 34]]}, "size_buckets: 34 frames is not 4n"),
        ({"size_buckets": [[512, 512]]}, "size_buckets: expected a list of"),
        ({"resolutions": [500]}, "resolutions: width 500 .*; use 512"),
        ({"resolutions": [8], **AR}, "resolutions: 8 is below 32"),
        ({}, "resolutions is missing"),
        ({"resolutions": [512], "enable_ar_bucket": True}, "enable_ar_bucket needs min_ar"),
        ({"resolutions": [[96, -96]]}, r"resolutions: \[96, -96\] is below 32"),
        ({"resolutions": [[96]]}, "resolutions: expected a number or"),
        (
            {"resolutions": [96], "enable_ar_bucket": True, "ar_buckets": [0]},
            "ar_buckets: 0 is not",
        ),
        (
            {"resolutions": [96], "enable_ar_bucket": True, "ar_buckets": [[1, 0]]},
            "ar_buckets: .* not",
        ),
        (
            {"resolutions": [96], "enable_ar_bucket": True, "ar_buckets": [[1]]},
            "ar_buckets: expected",
        ),
    ],
)
def test_shapes_that_the_model_cannot_take(keys, message):
    with pytest.raises(BadInput, match=rf"d\.toml: {message}"):
        rule_of(**keys)

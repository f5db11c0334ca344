from fractions import Fraction

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

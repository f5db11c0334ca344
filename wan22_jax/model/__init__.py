"""The three networks and their maths: no files, no config tree, no training.

Axes, used as suffixes of array names everywhere in this project:
  B batch · T frames (latent frames unless said otherwise) · Y rows · X columns · C channels ·
  L tokens = T * Y/2 * X/2 · D model width · H heads · K head dim · F feed-forward width ·
  S text tokens · E text width · R LoRA rank · N layers · M modulation vectors.
A literal size is written as its digit: ``sigma_BT111``, ``video_BTYX3``.

Every parameter's path in its module, joined by dots, is its name in the official checkpoint;
the layers of a stack share one entry ``blocks.<rest>`` whose leading axis is the layer.
Weights keep PyTorch's layout ([out, in] and [out, in, time, height, width]).
"""

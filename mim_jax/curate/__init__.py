"""Curation: a heap of images becomes a data set to pretrain on. The command is in `__main__.py`, the stages in `stages.py`.

Written from the papers: DINOv2 (Oquab et al. 2023, arXiv:2304.07193, section 3 and appendix A) and hierarchical k-means (Vo et
al. 2024, arXiv:2405.15613).

Two things make the result the same for any number of shards, blocks, threads and devices:

* Images are numbered in the order of the SHA-256 of their pixels. Ties go to the smaller number, that is, the smaller hash.
* Vectors have unit length and coordinates that are multiples of 1/2048 (`neighbors.quantized`). Products of two of them are
  multiples of 2**-22 below 2, so float32 holds each partial sum exactly, and no order of summation changes a bit.
"""

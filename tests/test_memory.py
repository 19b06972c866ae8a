"""The pool of output memory of the CPU backend.

The pool belongs to the whole process, and tensors of other tests come and go with the garbage
collector. So each of these tests has a process of its own.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

import spectral_ext
from spectral_ext.backends import cpu


@pytest.fixture
def in_new_process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield lambda function: executor.submit(function).result()


def outputs(size):
    return cpu.allocate([torch.empty(size, 1024)], [0])[0][0]


def reuse_memory_and_give_it_back():
    first = outputs(512)  # 2 MiB
    address = first.data_ptr()
    assert address % 64 == 0
    kept = outputs(512)
    assert kept.data_ptr() != address
    del first
    assert outputs(512).data_ptr() == address
    assert spectral_ext.empty_cache() >= 2 << 20
    assert spectral_ext.empty_cache() == 0
    kept.fill_(1)  # still ours
    assert kept.sum() == kept.numel()


def test_memory_is_reused_and_given_back(in_new_process):
    in_new_process(reuse_memory_and_give_it_back)


def use_one_after_the_other():
    for size in (512, 640, 768):  # no two at a time
        outputs(size)
    return spectral_ext.empty_cache()


def test_pool_holds_no_more_than_was_in_use(in_new_process):
    assert in_new_process(use_one_after_the_other) == 3 << 20

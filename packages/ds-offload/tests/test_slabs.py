"""Slabs begin on a page, come back when nobody looks at them, and are used again."""

from __future__ import annotations

import threading

import torch

from ds_offload.mapped import PAGE
from ds_offload.slabs import Slabs


def test_a_slab_is_free_when_the_last_tensor_over_it_is_gone() -> None:
    slabs = Slabs(keep_bytes=4 * PAGE)
    slab = slabs.lease(PAGE + 1)
    address = slab.data_ptr()
    assert (slab.nbytes, address % PAGE, slabs.leased_bytes) == (PAGE + 1, 0, 2 * PAGE)
    view = torch.empty(0).set_(slab.untyped_storage(), 5, (7,), (2,))  # as autograd's tensors are made
    del slab
    assert slabs.leased_bytes == 2 * PAGE
    view.fill_(3)
    del view
    assert (slabs.leased_bytes, slabs.free_bytes, slabs.peak_bytes) == (0, 2 * PAGE, 2 * PAGE)
    assert slabs.lease(2 * PAGE).data_ptr() == address


def test_no_more_than_what_may_be_kept_is() -> None:
    slabs = Slabs(keep_bytes=3 * PAGE)
    held = [slabs.lease(PAGE) for _ in range(5)]
    assert len({slab.data_ptr() for slab in held}) == 5
    del held
    assert (slabs.leased_bytes, slabs.free_bytes) == (0, 3 * PAGE)


def test_slabs_outlive_the_lender_and_go_on_any_thread() -> None:
    slabs = Slabs(keep_bytes=0)
    held = [slabs.lease(100).fill_(index) for index in range(8)]
    thread = threading.Thread(target=lambda: held.__delitem__(slice(4)))
    thread.start()
    thread.join()
    assert slabs.leased_bytes == 4 * PAGE
    del slabs
    assert [int(slab[99]) for slab in held] == [4, 5, 6, 7]

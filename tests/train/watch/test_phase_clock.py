"""What a rank waits for others counts to no phase of its own."""

import time

import pytest
import torch

from train.watch.phase_clock import PhaseClock


def test_seconds_by_phase_without_waits():
    clock = PhaseClock()
    for _ in range(2):
        clock.enter("data")
        time.sleep(0.05)
        clock.enter("forward")
        with clock.waiting():
            time.sleep(0.2)
            with clock.waiting():
                time.sleep(0.1)
        time.sleep(0.02)
    clock.enter("end")
    seconds = clock.seconds()
    assert seconds["data"] >= 0.1 and seconds["forward"] >= 0.04
    # Beside busy processes sleeps are longer, but not as long as what was waited for.
    assert seconds["forward"] < 0.4
    assert clock.seconds() == seconds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_of_a_gpu_by_its_own_clock_and_without_waiting_for_it():
    clock = PhaseClock(torch.device("cuda"), on_device=("forward",))
    cycles = 200_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    clock.enter("forward")
    torch.cuda._sleep(cycles)
    with clock.waiting():
        torch.cuda._sleep(2 * cycles)
    clock.enter("backward")
    assert "forward" not in clock.seconds(), "nobody has waited"
    torch.cuda.synchronize()
    clock.enter("end")
    seconds = clock.seconds()
    # 0.1 s at 2 GHz.
    assert 0.05 < seconds["forward"] < 0.3 and seconds["backward"] > seconds["forward"]

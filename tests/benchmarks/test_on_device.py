"""Latency and energy on the machine at hand: rows, meters that are there or absent, weights with a falling spectrum."""

import threading
import time

import pandas as pd
import pytest
import torch

from benchmarks import energy, on_device
from benchmarks.networks import batch_of
from lowrank.tensors.factors import factorise


@pytest.mark.slow
def test_rows_of_every_method(tmp_path, capsys):
    table = tmp_path / "on_device.csv"
    methods = ["vanilla", "vanilla_fused", "hosvd", "asi", "wsi", "wasi", "wasi_unfused"]
    sizes = [
        "--batch",
        "4",
        "--size",
        "32",
        "--repeats",
        "2",
        "--pairs",
        "1",
        "--energies",
        "0.5",
        "0.9",
        "--output",
        str(table),
    ]
    on_device.main(["--networks", "vit_mini", "--layers", "2", "--methods", *methods, *sizes])
    frame = pd.read_csv(table)
    assert len(frame) == 2 + 5 * 2
    vit = frame[frame.network == "vit_mini"].set_index(["method", "energy"])
    vanilla, wasi = vit.loc[("vanilla", float("nan"))], vit.loc[("wasi", 0.5)]
    assert wasi.activation_formula < vanilla.activation_formula
    assert wasi.weight_formula == wasi.weight_measured < vanilla.weight_measured == vanilla.weight_formula
    assert wasi.kept_measured < vanilla.kept_measured
    assert vit.loc[("wsi", 0.5)].weight_formula < vit.loc[("wsi", 0.9)].weight_formula
    assert (frame.step_s_least <= frame.step_s).all()
    assert (frame.step_s <= frame.step_s_most).all()
    assert (frame.inference_s > 0).all()
    assert (vit.loc["wasi", "step_over_vanilla"] > 0).all()
    assert pd.isna(vanilla.step_over_vanilla)
    assert wasi.kept_measured < vit.loc[("wasi_unfused", 0.5)].kept_measured < vanilla.kept_measured
    assert wasi.activation_formula == vit.loc[("wasi_unfused", 0.5)].activation_formula
    assert vanilla.weight_training_measured == 2 * vanilla.weight_measured
    assert wasi.weight_training_measured < vanilla.weight_training_measured < wasi.weight_emulated_formula
    assert set(frame.threads) == {torch.get_num_threads()}
    assert "energy meter:" in capsys.readouterr().out


def test_weights_of_convolutions_are_not_held_as_factors(tmp_path):
    table = tmp_path / "on_device.csv"
    sizes = ["--batch", "4", "--size", "32", "--repeats", "0", "--energies", "0.5", "--output", str(table)]
    on_device.main(["--networks", "mcunet", "--layers", "1", "--methods", "vanilla", "asi", "wasi", *sizes])
    frame = pd.read_csv(table)
    assert list(frame.method) == ["vanilla", "asi"]
    assert "step_s" not in frame, "memory alone"


def test_ranks_reach_the_energy_in_every_mode():
    model, names = on_device.build("vit_mini", "2")
    batch = batch_of(8, 32)
    inputs = {}
    handle = model.get_submodule(names[0]).register_forward_pre_hook(lambda layer, x: inputs.update(x=x[0]))
    ranks = on_device.ranks_at(model, names, batch, (0.5, 0.9))
    handle.remove()
    for share in (0.5, 0.9):
        for mode, rank in enumerate(ranks[share][names[0]]):
            values = torch.linalg.svdvals(inputs["x"].movedim(mode, 0).flatten(1)).square()
            shares = values.cumsum(0) / values.sum()
            assert shares[rank - 1] >= share - 1e-5
            assert rank == 1 or shares[rank - 2] < share + 1e-5


def test_the_spectrum_of_a_weight_falls_as_stated():
    weight = torch.randn(768, 96)
    norm = weight.norm()
    on_device.give_decaying_spectrum(weight)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(weight.norm(), norm)
    torch.testing.assert_close(values / values[0], torch.arange(1, 97).float() ** -0.5, rtol=1e-3, atol=1e-5)
    assert 40 < factorise(weight, 0.9).left.shape[1] < 60


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(str(content))


def test_a_machine_without_a_meter(tmp_path):
    assert energy.meter_name(tmp_path) == "absent"
    with energy.measured(tmp_path) as reading:
        pass
    assert reading.joules is None


def test_rapl_counts_packages_alone_and_may_go_round(tmp_path):
    powercap = tmp_path / "class" / "powercap"
    write(powercap / "intel-rapl:0", energy_uj=9_000_000, max_energy_range_uj=10_000_000)
    write(powercap / "intel-rapl:1", energy_uj=1_000_000, max_energy_range_uj=10_000_000)
    write(powercap / "intel-rapl:0:0", energy_uj=5)  # a part of package 0
    assert energy.meter_name(tmp_path) == "rapl"
    with energy.measured(tmp_path) as reading:
        write(powercap / "intel-rapl:0", energy_uj=500_000)
        write(powercap / "intel-rapl:1", energy_uj=3_000_000)
    assert reading.joules == pytest.approx(1.5 + 2.0)


def test_an_ina3221_is_integrated_over_time(tmp_path):
    hwmon = tmp_path / "class" / "hwmon"
    write(hwmon / "hwmon0", name="cpu_thermal", curr1_input=1, in1_input=1)
    write(hwmon / "hwmon1", name="ina3221\n", curr1_input=2000, in1_input=5000, curr2_input=500, in2_input=4000)
    assert energy.meter_name(tmp_path) == "ina3221"
    start = time.perf_counter()
    with energy.measured(tmp_path) as reading:
        threading.Event().wait(0.05)
    watts, most = 2 * 5 + 0.5 * 4, time.perf_counter() - start
    assert watts * 0.05 <= reading.joules <= watts * most

"""``inlay inspect``: its norms against the product formed in double precision, and what it must find."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from inlay.cli import main
from inlay.cli.inspection import product_norm

PREFIX = "base_model.model.layers.0."


@pytest.fixture
def folder(tmp_path):
    """A function that writes an adapter folder from a config and tensors."""

    def write(config: dict, tensors: dict[str, torch.Tensor]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        save_file({PREFIX + name: value for name, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def report(capsys, path, code: int = 0) -> dict:
    assert main(["inspect", str(path), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 3, "lora_alpha": 6}, 2.0),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"q": 3}, "alpha_pattern": {r"layers\.\d+\.q": 12}}, 4.0),
    ],
)
def test_norm_of_a_low_rank_update(config, scale, folder, capsys):
    torch.manual_seed(0)
    a, b = torch.randn(3, 10), torch.randn(7, 3)
    shown = report(capsys, folder(config, {"q.lora_A.weight": a, "q.lora_B.weight": b}))
    (site,) = shown["sites"]
    assert (site["module"], site["rank"], site["measure"]) == ("layers.0.q", 3, "update")
    assert site["size"] == pytest.approx(scale * float((b.double() @ a.double()).norm()), rel=1e-12)
    assert not site["dead"]


def test_norm_of_convolution_embedding_and_experts(folder, capsys):
    torch.manual_seed(1)
    made = {
        "conv.lora_A.weight": torch.randn(2, 3, 3, 3), "conv.lora_B.weight": torch.randn(5, 2, 1, 1),
        "words.lora_embedding_A": torch.randn(2, 11), "words.lora_embedding_B": torch.randn(4, 2),
    }  # fmt: skip
    shown = report(capsys, folder({"r": 2, "lora_alpha": 2}, made))
    sizes = {site["module"]: site["size"] for site in shown["sites"]}
    conv = torch.einsum(
        "or,rihw->oihw", made["conv.lora_B.weight"].double()[:, :, 0, 0], made["conv.lora_A.weight"].double()
    )
    assert sizes["layers.0.conv"] == pytest.approx(float(conv.norm()), rel=1e-12)
    words = made["words.lora_embedding_B"].double() @ made["words.lora_embedding_A"].double()
    assert sizes["layers.0.words"] == pytest.approx(float(words.norm()), rel=1e-12)


def test_norm_of_loha_and_distance_of_ia3(folder, capsys):
    torch.manual_seed(2)
    parts = {name: torch.randn(shape) for name, shape in
             {"w1_a": (300, 2), "w1_b": (2, 9), "w2_a": (300, 2), "w2_b": (2, 9)}.items()}  # fmt: skip
    shown = report(
        capsys, folder({"peft_type": "LOHA", "r": 2, "alpha": 4}, {f"q.hada_{k}": v for k, v in parts.items()})
    )
    wide = {name: value.double() for name, value in parts.items()}
    expected = 2.0 * float(((wide["w1_a"] @ wide["w1_b"]) * (wide["w2_a"] @ wide["w2_b"])).norm())
    assert shown["sites"][0]["size"] == pytest.approx(expected, rel=1e-12)

    shown = report(
        capsys, folder({"peft_type": "IA3"}, {"q.ia3_l": torch.full((4, 1), 1.5), "k.ia3_l": torch.ones(4, 1)})
    )
    assert {s["module"]: (s["size"], s["dead"]) for s in shown["sites"]} == {
        "layers.0.q": (1.0, False), "layers.0.k": (0.0, True),
    }  # fmt: skip


def test_product_norm_is_never_formed():
    up, down = torch.ones(200_000, 1, dtype=torch.float64), torch.ones(1, 300_000, dtype=torch.float64)
    assert product_norm(up, down) == pytest.approx(math.sqrt(200_000 * 300_000))


def test_finds_what_is_broken(folder, capsys):
    hurt = torch.randn(3, 5)
    hurt[1, 2], hurt[0, 0] = float("nan"), float("inf")
    path = folder(
        {"r": 3, "lora_alpha": 3, "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"},
        {"q.lora_A.weight": hurt, "q.lora_B.weight": torch.randn(4, 3), "k.lora_A.weight": torch.randn(3, 5),
         "k.lora_B.weight": torch.zeros(4, 3), "v.lora_A.weight": torch.randn(3, 5), "head.weight": torch.ones(2, 2)},
    )  # fmt: skip
    shown = report(capsys, path, code=1)
    assert (shown["method"], shown["base_model"], shown["task_type"]) == ("LORA", "some/base", "CAUSAL_LM")
    assert [(t["name"], t["non_finite"]) for t in shown["non_finite"]] == [(PREFIX + "q.lora_A.weight", 2)]
    assert shown["incomplete"] == ["layers.0.v.lora_B"]
    assert [site["module"] for site in shown["sites"] if site["dead"]] == ["layers.0.k"]
    assert [tensor["name"] for tensor in shown["saved"]] == [PREFIX + "head.weight"]
    assert main(["inspect", str(path)]) == 1
    text = capsys.readouterr().out
    assert f"not finite: {PREFIX}q.lora_A.weight, 2 of its values" in text
    assert "missing: layers.0.v.lora_B" in text


def test_refuses_what_is_no_adapter(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "neither a folder nor a file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err

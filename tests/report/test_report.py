"""The page: what is in it, what is left out, and that strings from strangers stay strings."""

import json
import math
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.colors import Normalize

from moequant.cli import main
from moequant.errors import GGUFError, UsageError
from moequant.gguf_file import read_model
from moequant.report import Measured, gather, render
from moequant.report.model_file import Grid, bits_by_expert, bits_by_tensor
from moequant.report.plots import heat_map
from tests.gguf_files import split
from tests.report.inputs import evaluation_json, routing_json, shares, tensor, write_model

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x^2 & \x07 日本"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_sections_without_data_are_left_out_and_said_how_to_get(model: Path) -> None:
    page = render(gather(model))
    assert headings(page) == [
        "Size by role", "Bits per weight", "Expert use", "Starved experts", "Fallbacks",
        "Provenance", "Not in this report",
    ]  # fmt: skip
    absent = page[page.index("Not in this report") :]
    assert "moequant evaluate" in absent
    assert "moequant routing" in absent


def test_everything_measured_is_shown(model: Path, tmp_path: Path) -> None:
    evaluation = write(tmp_path / "evaluation.json", evaluation_json(model))
    routing = write(tmp_path / "routing.json", routing_json())
    page = render(gather(model, evaluation, routing))
    assert headings(page)[:4] == [
        "Fidelity", "Distribution of the KLD", "Error by layer", "What hurts most",
    ]  # fmt: skip
    assert {"Routing", "Ablation", "Expert use"} <= set(headings(page))
    assert "Not in this report" not in headings(page)
    for shown in ("11.2700 ± 0.3000", "nf4", "top-3", "blk.1.ffn_gate_up_exps.weight", "5.17"):
        assert shown in page
    assert "on prose, code (9000 tokens)" in page


def test_perplexity_of_an_export_is_shown_without_an_evaluation(model: Path) -> None:
    page = render(gather(model, perplexity=(Measured(11.27, 0.3), Measured(11.39, 0.31))))
    assert "11.2700 ± 0.3000" in page
    assert "+1.06%" in page


def test_strings_of_a_file_never_become_markup(tmp_path: Path) -> None:
    keys = {"general.name": HOSTILE, "moequant.plan.preset": HOSTILE,
            "moequant.experts.thin": [HOSTILE], "moequant.plan.fallbacks": [HOSTILE],
            "general.license": HOSTILE}  # fmt: skip
    names = (f"blk.0.{HOSTILE}.weight", f"{HOSTILE}.weight")
    extra = tuple(tensor(name, (4096, 256), "F32") for name in names)
    file = write_model(tmp_path / "model.gguf", metadata=keys, extra=extra)
    evaluation, routing = evaluation_json(file), routing_json()
    evaluation |= {"reference": HOSTILE, "notes": [HOSTILE], "engine": HOSTILE, "file": HOSTILE}
    evaluation["text"]["name"] = evaluation["models"][0]["name"] = HOSTILE
    evaluation["models"][0]["worst_tensors"] = [names[0], "\ud800"]
    routing["ablation"][0]["name"] = routing["texts"][0]["name"] = HOSTILE
    routing["checkpoint"] = HOSTILE
    page = render(gather(file, write(tmp_path / "e.json", evaluation),
                         write(tmp_path / "r.json", routing)))  # fmt: skip
    found = Elements(page)
    assert not {"script", "img", "iframe", "object", "link", "form"} & {t for t, _ in found.tags}
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert sum("<script>alert(1)" in text for text in found.texts) >= 10


def test_page_refers_to_nothing_outside_itself(model: Path, tmp_path: Path) -> None:
    evaluation = write(tmp_path / "evaluation.json", evaluation_json(model))
    page = render(gather(model, evaluation))
    found = Elements(page)
    links = [value or "" for _, attributes in found.tags for name, value in attributes.items()
             if name in ("href", "src", "xlink:href", "srcset", "action")]  # fmt: skip
    assert len(links) > 20
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert re.findall(r"url\((?!#)|@import|@font-face|https?://", page) == []
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page


def test_ids_are_unique_and_every_plot_has_a_text_alternative(model: Path, tmp_path: Path) -> None:
    evaluation = write(tmp_path / "evaluation.json", evaluation_json(model))
    routing = write(tmp_path / "routing.json", routing_json())
    found = Elements(render(gather(model, evaluation, routing)))
    ids = [attributes["id"] for _, attributes in found.tags
           if "id" in attributes]  # fmt: skip
    assert len(ids) > 20
    assert len(ids) == len(set(ids))
    plots = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(plots) >= 10
    assert all(len(plot["aria-label"] or "") > 20 for plot in plots)
    targets = {attributes.get("id") for _, attributes in found.tags}
    links = [attributes.get("href") or "" for tag, attributes in found.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= targets


def test_the_same_inputs_give_the_same_page(model: Path, tmp_path: Path) -> None:
    evaluation = write(tmp_path / "evaluation.json", evaluation_json(model))
    assert render(gather(model, evaluation)) == render(gather(model, evaluation))


def test_sixty_layers_of_128_experts_stay_under_a_megabyte(tmp_path: Path) -> None:
    file = write_model(tmp_path / "model.gguf", 60, 128, banked=True)
    assert len(render(gather(file))) < 1_000_000


def test_bits_by_tensor_are_those_of_the_types(tmp_path: Path) -> None:
    grid = bits_by_tensor(read_model(write_model(tmp_path / "model.gguf", 4)))
    assert grid is not None
    assert grid.columns == ["0", "1", "2", "3"]
    rows = dict(zip(grid.rows, grid.values.tolist(), strict=True))
    assert set(rows) == {"attn_q", "attn_v", "ffn_gate_inp", "ffn_gate_up_exps", "ffn_down_exps"}
    assert rows["attn_v"] == [4.5, 4.5, 6.5625, 4.5]
    assert rows["ffn_down_exps"] == [5.5, 5.5, 8.5, 5.5]


def test_bits_by_expert_follow_the_bank_map(tmp_path: Path) -> None:
    file = read_model(write_model(tmp_path / "model.gguf", 2, 4, banked=True))
    grids = bits_by_expert(file)
    assert list(grids) == ["ffn_down_exps"]
    assert grids["ffn_down_exps"].rows == ["0", "1"]
    assert grids["ffn_down_exps"].values.tolist() == [[8.5, 4.5, 4.5, 4.5], [5.5] * 4]
    whole = bits_by_tensor(file)
    assert whole is not None
    assert whole.values[whole.rows.index("ffn_down_exps")].tolist() == [5.5, 5.5]


def test_expert_use_is_relative_to_an_even_share(model: Path) -> None:
    page = render(gather(model))
    for value in (4 * shares(2, 4)).ravel():
        assert f"<td>{value:.2f}</td>" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, r"models is \[\], not a list with the file's figures first"),
        ({"models": 3}, "models is 3, not a list of objects"),
        ({"text": None}, "text is None, not an object"),
        ({"notes": "n"}, "notes is 'n', not a list of texts"),
        ({"reference_perplexity": {"ppl": math.nan, "stderr": 1}},
         "reference_perplexity.ppl is nan, not a finite number"),
        ({"reference_perplexity": {"ppl": 10**400, "stderr": 1}}, "not a finite number"),
        ({"models": [{"name": "x", "kld": {}}]}, r"models\[0\].bytes is missing"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_an_evaluation_is_named(
    model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "evaluation.json", evaluation_json(model) | change)
    with pytest.raises(UsageError, match=rf"evaluation\.json: .*{message}"):
        gather(model, path)


@pytest.mark.parametrize("edges", [[1, 2], [3, 2, 1]])
def test_edges_that_do_not_fit_their_counts_are_named(
    model: Path, tmp_path: Path, edges: list[int]
) -> None:
    data = evaluation_json(model)
    data["models"][0]["kld_histogram"] = {"edges": edges, "counts": [1, 1]}
    with pytest.raises(UsageError, match=r"models\[0\].kld_histogram.edges is .*, not 3 rising"):
        gather(model, write(tmp_path / "evaluation.json", data))


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '{"a": 1e', "[" * 100_000])
def test_what_is_no_json_object_is_said_so(model: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="moequant evaluate --json"):
        gather(model, path)


def test_an_evaluation_of_another_file_is_refused(model: Path, tmp_path: Path) -> None:
    """The same model, quantized otherwise, exported over the file that was measured."""
    path = write(tmp_path / "evaluation.json", evaluation_json(model))
    gather(model, path)
    before = read_model(model)
    write_model(model, extra=(tensor("output.weight", (64, 256), "Q8_0"),))
    data, found = evaluation_json(model), read_model(model)
    nbytes = [sum(t.nbytes for t in file.tensors.values()) for file in (before, found)]
    with pytest.raises(UsageError) as refused:
        gather(model, path)
    assert f"{path} is about another file than {model}:" in str(refused.value)
    assert f"{nbytes[0]} bytes there, {nbytes[1]} bytes in the file" in str(refused.value)
    assert f"moequant evaluate {model} --reference org/made-up --save {path}" in str(refused.value)
    gather(model, write(path, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes": 7_300_000}, "all tensors: 7300000 bytes there, 44224 bytes in the file"),
        ({"bpw": 5.17}, r"bits per weight: 5\.1700 there, 6\.4579 in the file"),
        ({"name": "blk.0.attn_q.weight", "qtype": "Q5_0"},
         r"blk\.0\.attn_q\.weight: Q5_0, 4608 bytes there; Q4_K, 4608 bytes in the file"),
        ({"name": "blk.1.attn_q.weight", "nbytes": 1},
         r"blk\.1\.attn_q\.weight: Q4_K, 1 bytes there; Q4_K, 4608 bytes in the file"),
        ({"name": "blk.2.attn_q.weight"}, r"blk\.2\.attn_q\.weight: not in the file"),
    ],
)  # fmt: skip
def test_each_figure_of_another_file_is_named(
    model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = evaluation_json(model)
    row = data["models"][0]
    if "name" in change:
        row["tensors"] = [{"qtype": "Q4_K", "nbytes": 4608, "nmse": None} | change]
    else:
        row |= change
    with pytest.raises(UsageError, match=message):
        gather(model, write(tmp_path / "evaluation.json", data))


def test_tensors_in_banks_or_halves_are_those_that_were_measured(tmp_path: Path) -> None:
    """An evaluation names whole tensors, where the file has banks, or gate and up apart."""
    halves = [tensor(f"blk.2.ffn_{half}_exps.weight", (4, 4, 256), qtype)
              for half, qtype in (("gate", "Q4_K"), ("up", "Q6_K"))]  # fmt: skip
    file = write_model(tmp_path / "model.gguf", banked=True, extra=tuple(halves))
    data = evaluation_json(file)
    rows = [t for t in data["models"][0]["tensors"] if not t["name"].startswith("blk.2.")]
    assert "Q8_0+Q4_0" in [row["qtype"] for row in rows]
    whole = {"name": "blk.2.ffn_gate_up_exps.weight", "qtype": "Q4_K+Q6_K", "layer": 2,
             "nbytes": sum(half.nbytes for half in halves), "nmse": None}  # fmt: skip
    data["models"][0]["tensors"] = [*rows, whole]
    gather(file, write(tmp_path / "evaluation.json", data))
    whole["nbytes"] += 1
    with pytest.raises(UsageError, match=r"blk\.2\.ffn_gate_up_exps\.weight: Q4_K\+Q6_K"):
        gather(file, write(tmp_path / "evaluation.json", data))


def test_a_routing_of_another_model_is_refused(tmp_path: Path) -> None:
    """By the routers, which a file without calibration has, too."""
    file = write_model(tmp_path / "model.gguf", metadata={"moequant.experts.layers": "none"})
    experts = write(tmp_path / "routing.json", routing_json(experts=8))
    with pytest.raises(UsageError, match="layer 0 has 8 experts there and 4 in the file"):
        gather(file, None, experts)


def test_a_split_file_is_one_model(model: Path, tmp_path: Path) -> None:
    first = split(model, tmp_path / "shards", 4)
    assert len(list(first.parent.iterdir())) > 2
    data = gather(first, write(tmp_path / "evaluation.json", evaluation_json(model)))
    assert data.bits is not None
    assert data.bits.columns == ["0", "1"]
    assert data.inspection.nbytes == gather(model).inspection.nbytes
    assert "Fidelity" in headings(render(data))


def test_what_is_not_finite_is_said_so(model: Path, tmp_path: Path) -> None:
    """null stands for NaN and infinity; fields nobody knows are passed over."""
    data = evaluation_json(model) | {
        "new": {},
        "reference_perplexity": {"ppl": None, "stderr": None},
    }
    row = data["models"][0]
    row |= {
        "perplexity": {"ppl": None, "stderr": None, "new": 1},
        "ppl_ratio": {"value": 1.5, "stderr": None},
        "kld_histogram": None,
        "worst_tensors": [],
        "new": [],
    }
    row["kld"] = dict.fromkeys(row["kld"]) | {"token_stderr": None}
    row["layers"][1]["hidden_nmse"] = None
    row["tensors"][0] |= {"nmse": None, "new": "?"}
    page = render(gather(model, write(tmp_path / "evaluation.json", data)))
    assert "The reference, org/made-up, has PPL not finite." in page
    assert "<td>1.5000 ± not finite</td>" in page
    assert "<td>PPL</td><td>not finite</td>" in page
    assert "largest not finite after layer 1" in page
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", page)


def test_no_control_character_and_no_change_of_direction_reaches_the_page(tmp_path: Path) -> None:
    """None that HTML forbids, and none that shows a text in another order than it has."""
    hostile = "a\x1b[31mb\x00c\x85d\u202egnp.exe\u2066e\ufffef\U0010ffffg\rh\x7f"
    extra = (tensor(f"blk.0.{hostile}.weight", (4096, 256), "F32"),)
    metadata = {"general.name": hostile, "general.license": hostile}
    file = write_model(tmp_path / "model.gguf", metadata=metadata, extra=extra)
    data = evaluation_json(file)
    data["reference"] = data["models"][1]["name"] = hostile
    page = render(gather(file, write(tmp_path / "evaluation.json", data)))
    forbidden = [c for c in set(page) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn")]
    assert forbidden == ["\n"]
    assert page.count("gnp.exe") > 5


def test_scales_say_that_they_are_logarithmic_cut_or_clipped(tmp_path: Path) -> None:
    file = write_model(tmp_path / "model.gguf")
    data = evaluation_json(file)
    page = render(gather(file, write(tmp_path / "evaluation.json", data)))
    for said in ("KLD in nats (log scale)", "NMSE of hidden states (log scale)",
                 "bits per weight (log scale)", "overlap (axis from 80%)"):  # fmt: skip
        assert said in page
    assert ">≥ 16<" in page
    for row in data["models"][0]["layers"]:
        row |= {"hidden_nmse": 0.0, "router_overlap": 0.3}
    data["models"][0]["kld_histogram"] = {"edges": [0.0, 0.1], "counts": [1]}
    plain = render(gather(file, write(tmp_path / "evaluation.json", data)))
    assert "KLD in nats<" in plain
    assert "NMSE of hidden states<" in plain
    assert "overlap<" in plain


@pytest.mark.parametrize(("most", "end"), [(1.5, "2"), (2.0, "2"), (2.04, "≥ 2")])
def test_the_end_of_a_colour_scale_says_whether_values_lie_past_it(most: float, end: str) -> None:
    grid = Grid(["0"], list("abcd"), np.array([[0.5, 1.0, 1.0, most]]))
    norm = Normalize(0, 2)
    plot = heat_map(grid, "label", rows="", columns="", scale="", norm=norm)
    assert f">{end}<" in plot.wide


def test_degenerate_numbers_are_drawn(tmp_path: Path) -> None:
    """No error at all, one value in every cell, one layer, nothing counted: still a page."""
    file = write_model(tmp_path / "model.gguf", 1, 4)
    evaluation, routing = evaluation_json(file, 1), routing_json(1)
    first = evaluation["models"][0]
    first["layers"] = [{"layer": 0, "hidden_nmse": 0.0, "own_nmse": 0.0, "router_overlap": 1.0}]
    first["kld"] = dict.fromkeys(first["kld"], 0.0)
    first["kld_histogram"] = {"edges": [0.0, 1e-3, 1.0], "counts": [0, 0]}
    routing["layers"][0] |= {"share": [0.25] * 4, "branch": None, "cosine": None}
    routing["ablation"][0] |= {"ppl": None, "stderr": None}
    page = render(gather(file, write(tmp_path / "e.json", evaluation),
                         write(tmp_path / "r.json", routing)))  # fmt: skip
    assert "overflowed" in page
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_command_writes_beside_the_file_and_never_over_it(model: Path) -> None:
    run = CliRunner().invoke
    assert run(main, ["report", str(model)]).exit_code == 0
    page = model.with_suffix(".html")
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    again = run(main, ["report", str(model)])
    assert again.exit_code == 2
    assert "--force" in again.output
    assert run(main, ["report", str(model), "--force"]).exit_code == 0
    onto = run(main, ["report", str(model), "-o", str(model), "--force"])
    assert onto.exit_code == 2
    read_model(model)


def test_command_takes_an_evaluation_that_names_its_file(model: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "evaluation.json", evaluation_json(model) | {"file": f"elsewhere/{model.name}"}
    )
    result = CliRunner().invoke(main, ["report", str(source)])
    assert result.exit_code == 0, result.output
    assert "Fidelity" in model.with_suffix(".html").read_text("utf-8")
    model.unlink()
    gone = CliRunner().invoke(main, ["report", str(source), "--force"])
    assert gone.exit_code == 2
    assert "which is not there" in gone.output


def test_command_prints_json(model: Path, tmp_path: Path) -> None:
    data = evaluation_json(model) | {"file": "old.gguf", "notes": ["no \x1b[31mred"]}
    source, page = write(tmp_path / "evaluation.json", data), tmp_path / "page.html"
    command = ["report", str(model), "--evaluation", str(source), "-o", str(page), "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["report"] == str(page)
    assert found["notes"][0] == "no \x1b[31mred"
    assert "names the file old.gguf" in found["notes"][1]
    assert "\x1b" not in result.stderr


def test_a_damaged_file_leaves_no_page(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:2000])
    with pytest.raises(GGUFError):
        gather(model)
    assert CliRunner().invoke(main, ["report", str(model)]).exit_code == 2
    assert not model.with_suffix(".html").exists()


def test_export_writes_the_report_beside_the_file(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    command = ["export", str(tiny_model), "-o", str(output), "--quant", "Q8_0"]
    command += ["--report", "--json"]
    (tmp_path / "model.html").touch()
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert not output.exists()
    (tmp_path / "model.html").unlink()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"] == str(tmp_path / "model.html")
    assert "Size by role" in headings((tmp_path / "model.html").read_text("utf-8"))

"""A series of checkpoints: found in every form, put in order, and what doesn't belong is named with its reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import save_adapter
from tiny import tiny_hf, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.models.checkpoints.adapter_base import Base
from mechlens.models.checkpoints.folders import CONFIG
from mechlens.models.checkpoints.series import checkpoint_series, content_of
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.load import load, load_config
from mechlens.models.packaged import cache_dir
from mechlens.prompts.prompt import Prompt
from mechlens.studies.behaviours.config import Behaviours
from mechlens.studies.behaviours.tuned import tuned_runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and one adapter to make series of."""
    root = tmp_path_factory.mktemp("series")
    tiny_hf().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    save_adapter(str(root / "base"), root / "adapter", seed=1)
    return root


def run_folder(root: Path, out: Path, steps: tuple[int, ...] = (2, 10, 1)) -> Path:
    for step in steps:
        shutil.copytree(root / "adapter", out / f"checkpoint-{step}")
    return out


def test_a_trainers_folder_in_the_order_of_its_steps(root: Path, tmp_path: Path) -> None:
    series = checkpoint_series(str(root / "base"), [str(run_folder(root, tmp_path / "out"))])
    assert [(member.step, member.name, member.kind) for member in series.members] == [
        (0, "base", "base"), (1, "checkpoint-1", "adapter"), (2, "checkpoint-2", "adapter"),
        (10, "checkpoint-10", "adapter"),
    ]  # fmt: skip
    assert (series.kind, series.steps_from, series.left_out) == ("adapter", "their records", ())


def test_adapters_by_any_name_single_ones_and_the_order_given(root: Path, tmp_path: Path) -> None:
    for name in ("late_20", "early_3"):
        shutil.copytree(root / "adapter", tmp_path / "some" / name)
    folder = checkpoint_series(str(root / "base"), [str(tmp_path / "some")])
    assert [member.step for member in folder.members] == [0, 3, 20]
    for name in ("one", "two"):
        shutil.copytree(root / "adapter", tmp_path / name)
    given = checkpoint_series(str(root / "base"), [str(tmp_path / "two"), str(tmp_path / "one")])
    assert [(member.step, member.name) for member in given.members[1:]] == [(1, "two"), (2, "one")]
    assert given.steps_from == "the order given"


def test_an_adapter_of_another_base_is_named_before_any_weights_are_read(root: Path, tmp_path: Path) -> None:
    tiny = tiny_hf().config
    config = type(tiny)(**{**tiny.to_dict(), "intermediate_size": tiny.intermediate_size + 8})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    save_adapter(str(tmp_path / "other"), tmp_path / "foreign", seed=1)
    shutil.copytree(root / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=r"it changes model.layers.0.mlp.down_proj of shape .*, which has shape .* in"):
        checkpoint_series(str(tmp_path / "base"), [str(tmp_path / "foreign")])
    assert checkpoint_series(str(tmp_path / "base"), [str(root / "adapter")]).members[1].kind == "adapter"


def test_names_on_the_hub_tell_bases_of_one_shape_apart(root: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(root / "adapter", tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "owner/Tiny-Chat"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config = load_config(str(root / "base"))
    said = Base("owner/tiny", config).problem(adapter)
    assert (
        said
        == "it was trained on 'owner/Tiny-Chat', and the base is 'owner/tiny'; give the base that it was trained on"
    )
    for same in ("owner/Tiny-Chat", "others/tiny-chat", str(root / "base"), "smollm2"):
        assert Base(same, config).problem(adapter) is None


def test_steps_come_from_records_before_names(root: Path, tmp_path: Path) -> None:
    out = run_folder(root, tmp_path / "out", (1, 2))
    (out / "checkpoint-1" / "mechlens.json").write_text(json.dumps({"step": 7, "base_fingerprint": "ab"}))
    (out / "checkpoint-2" / "mechlens.json").write_text(json.dumps({"step": 9, "base_fingerprint": "ab"}))
    members = checkpoint_series(str(root / "base"), [str(out)]).members
    assert [(member.step, member.base_fingerprint) for member in members[1:]] == [(7, "ab"), (9, "ab")]


def test_full_models_and_sharded_ones(root: Path, tmp_path: Path) -> None:
    for step, shard in ((4, "1GB"), (8, "20KB")):
        tiny_hf(seed=step).save_pretrained(tmp_path / "run" / f"checkpoint-{step}", max_shard_size=shard)
    assert len(list((tmp_path / "run" / "checkpoint-8").glob("*.safetensors"))) > 1
    series = checkpoint_series(str(root / "base"), [str(tmp_path / "run")])
    assert [(member.step, member.kind) for member in series.members[1:]] == [(4, "full"), (8, "full")]
    next((tmp_path / "run" / "checkpoint-8").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"checkpoint-8: it has no model-\S+, so it is half-written"):
        checkpoint_series(str(root / "base"), [str(tmp_path / "run")])


def damaged(root: Path, out: Path) -> Path:
    """Nine checkpoints of which only 1 and 9 are good."""
    run_folder(root, out, (1, 2, 3, 4, 9))
    weights = out / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (out / "checkpoint-3" / "adapter_model.safetensors").unlink()
    (out / "checkpoint-4" / "adapter_config.json").write_text("{")
    shutil.copytree(out / "checkpoint-9", out / "checkpoint-5")
    (out / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 9}')
    other = tiny_tokenizer(extra=("<new>",))
    shutil.copytree(root / "adapter", out / "checkpoint-6")
    other.save_pretrained(out / "checkpoint-6")
    shutil.copytree(root / "adapter", out / "checkpoint-7")
    tiny_tokenizer(template="{{ messages[0]['content'] }}").save_pretrained(out / "checkpoint-7")
    tiny_hf("qwen3").save_pretrained(out / "checkpoint-8")
    (out / "checkpoint-10").mkdir()
    return out


def test_every_kind_of_damage_is_named(root: Path, tmp_path: Path) -> None:
    out = str(damaged(root, tmp_path / "out"))
    series = checkpoint_series(str(root / "base"), [out], skip_broken=True)
    assert [member.step for member in series.members] == [0, 1, 9]
    reasons = {one.name: one.reason for one in series.left_out}
    for step, words in {
        2: "truncated", 3: "half-written", 4: "can't be read", 6: "another vocabulary", 7: "chat template",
        8: "model_type is qwen3, and the base's is llama", 10: "half-written",
    }.items():  # fmt: skip
        assert words in reasons[f"checkpoint-{step}"]
    assert any("it has step 9, and so has" in reason for reason in reasons.values())
    assert len(reasons) == 8
    with pytest.raises(UserError, match=r"8 of 10 checkpoints are broken.*`skip_broken`"):
        checkpoint_series(str(root / "base"), [out])


def test_a_checkpoint_without_the_record_that_is_written_last_is_half_written(root: Path, tmp_path: Path) -> None:
    out = run_folder(root, tmp_path / "out", (1, 2))
    (out / "checkpoint-1" / "mechlens.json").write_text(json.dumps({"step": 1, "base_fingerprint": "ab"}))
    series = checkpoint_series(str(root / "base"), [str(out)], skip_broken=True)
    assert [one.name for one in series.left_out] == ["checkpoint-2"]
    assert "written last" in series.left_out[0].reason


def test_sources_that_hold_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for source, words in (("empty", "neither checkpoints"), ("missing", "no folder"), ("file", "is a file")):
        with pytest.raises(UserError, match=words):
            checkpoint_series(str(root / "base"), [str(tmp_path / source)])
    with pytest.raises(UserError, match="no checkpoints"):
        checkpoint_series(str(root / "base"), [])
    only = run_folder(root, tmp_path / "out", (1,))
    (only / "checkpoint-1" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        checkpoint_series(str(root / "base"), [str(only)], skip_broken=True)


def test_a_mistyped_folder_is_no_broken_checkpoint(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(root, Path("runs/tuned"), (1,))
    for given, meant in (
        ("runs/tunde", "runs/tuned"), ("rusn/tuned", "runs/tuned"), ("rusn", "runs"), ("./runs/tuend", "runs/tuned"),
        ("runs/tunde/checkpoint-1", "runs/tuned/checkpoint-1"),
    ):  # fmt: skip
        for skip in (False, True):
            with pytest.raises(UserError, match=f"folder.*did you mean '{meant}'") as told:
                checkpoint_series(str(root / "base"), [given], skip_broken=skip)
            assert "skip" not in str(told.value)


def test_a_folder_that_is_passed_over_is_named(root: Path, tmp_path: Path) -> None:
    out = run_folder(root, tmp_path / "out", (1,))
    shutil.copytree(root / "adapter", out / "checkpoint-best")
    with pytest.warns(UserWarning, match=r"out/checkpoint-best is passed over: .* called checkpoint-NUMBER"):
        series = checkpoint_series(str(root / "base"), [str(out)])
    assert [member.step for member in series.members] == [0, 1]


def test_a_runs_broken_checkpoint_is_left_out_where_that_is_asked_for(root: Path, tmp_path: Path) -> None:
    base, out = str(root / "base"), run_folder(root, tmp_path / "out", (1, 2))
    (out / "checkpoint-1" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="leave it out with `skip_broken`"):
        tuned_runs(base, [str(out)], None)
    (run,) = tuned_runs(base, [str(out)], None, skip_broken=True)
    assert [member.step for member in run.members] == [2]
    assert [one.name for one in run.left_out] == ["checkpoint-1"]
    assert Behaviours(checkpoints=("out",), out="x", skip_broken=True).skip_broken


def test_the_verb_without_paths_is_mistyped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["checkpoints"])
    assert stop.value.code == 2
    assert "there are no checkpoints; name a training run's output folder" in capsys.readouterr().err


def test_a_bias_that_the_base_has_no_place_for_is_refused_early(root: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(root / "adapter", tmp_path / "adapter"))
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**settings, "lora_bias": True}))
    said = Base(str(root / "base"), load_config(str(root / "base"))).problem(adapter)
    assert said is not None
    assert "(lora_bias), which has none in" in said


def test_two_runs_with_one_step_need_names_of_their_own(root: Path, tmp_path: Path) -> None:
    runs = [str(run_folder(root, tmp_path / name, steps)) for name, steps in (("a", (1,)), ("b", (1,)))]
    series = checkpoint_series(str(root / "base"), runs, skip_broken=True)
    assert "it has step 1" in series.left_out[0].reason


def test_content_changes_with_the_bytes(root: Path, tmp_path: Path) -> None:
    out = run_folder(root, tmp_path / "out", (1, 2))
    series = checkpoint_series(str(root / "base"), [str(out)])
    same = {content_of(member) for member in series.members[1:]}
    assert len(same) == 1
    save_adapter(str(root / "base"), out / "checkpoint-2", seed=5)
    assert {content_of(member) for member in series.members[1:]} != same


def test_the_verb_shows_the_series(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(damaged(root, tmp_path / "out"))
    main(["checkpoints", out, "--base", str(root / "base"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert [member["step"] for member in said["members"]] == [0, 1, 9]
    assert len(said["left_out"]) == 8
    main(["checkpoints", out, "--base", str(root / "base")])
    shown = capsys.readouterr().out
    assert "checkpoint-9" in shown
    assert "truncated" in shown


REVISIONS = """
import json, sys, torch
from mechlens.models.native import native
from mechlens.models.checkpoints.adapter_base import Base
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
series = checkpoint_series("org/tiny", ["org/tiny@step20", "org/tiny@step3"])
found = [[member.step, member.name, member.kind, member.revision] for member in series.members]
sums = []
with checkpoint_swapper("org/tiny") as one:
    for member in series.members:
        with native(one.put(member)) as hf_model:
            sums.append(float(sum(p.double().sum() for p in hf_model.parameters())))
print(json.dumps([found, sums]))
"""


def test_revisions_on_the_hub(tmp_path: Path) -> None:
    """From a hub cache on disk, as no network is to be had here."""
    hub, sums = tmp_path / "hub" / "models--org--tiny", {}
    for k, revision in enumerate(("main", "step3", "step20")):
        model, commit = tiny_hf(seed=k), f"{k}" * 40
        model.save_pretrained(hub / "snapshots" / commit)
        tiny_tokenizer().save_pretrained(hub / "snapshots" / commit)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(commit)
        sums[revision] = float(sum(p.detach().double().sum() for p in model.parameters()))
    places = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "MECHLENS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REVISIONS], capture_output=True, text=True, check=False,
        env={**os.environ, **places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, read = json.loads(done.stdout.splitlines()[-1])
    assert found == [
        [0, "tiny", "base", None], [3, "tiny@step3", "full", "step3"], [20, "tiny@step20", "full", "step20"]
    ]  # fmt: skip
    assert read == pytest.approx(list(sums.values()))


def test_forms_that_are_not_read_are_called_by_their_names(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step, (file, config) in enumerate(
        [
            ("pytorch_model.bin", "config.json"),
            ("pytorch_model.bin.index.json", "config.json"),
            ("adapter_model.bin", "adapter_config.json"),
            ("pytorch_model_fsdp.bin", "config.json"),
            ("pytorch_model_fsdp_0/__0_0.distcp", ""),
            ("global_step7/mp_rank_00_model_states.pt", ""),
            ("zero_to_fp32.py", "adapter_config.json"),
        ],
        start=1,
    ):
        folder = out / f"checkpoint-{step}"
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        if config:
            shutil.copy((root / "base" if config == "config.json" else root / "adapter") / config, folder / config)
    shutil.copytree(root / "adapter", out / "checkpoint-9")
    left = checkpoint_series(str(root / "base"), [str(out)], skip_broken=True).left_out
    kinds = ["pickled", "pickled", "pickled", "FSDP", "FSDP", "DeepSpeed", "DeepSpeed"]
    assert [one.name for one in left] == [f"checkpoint-{step}" for step in range(1, 8)]
    for one, kind in zip(left, kinds, strict=True):
        assert kind in one.reason
        assert "half-written" not in one.reason
    for step, kind in enumerate(kinds, start=1):
        folder = out / f"checkpoint-{step}"
        if (folder / "adapter_config.json").exists():
            with pytest.raises(UserError, match=kind):
                load(str(root / "base"), adapter=str(folder))
        else:
            with pytest.raises(UserError, match=kind):
                load(str(folder))
    shutil.copytree(out / "checkpoint-5", tmp_path / "run")
    with pytest.raises(UserError, match="FSDP"):
        checkpoint_series(str(root / "base"), [str(tmp_path / "run")])


def test_an_adapter_with_a_name_of_its_own(root: Path, tmp_path: Path) -> None:
    """peft puts it into a folder of that name below the step's."""
    out = tmp_path / "out"
    for step in (5, 20):
        shutil.copytree(root / "adapter", out / f"checkpoint-{step}" / "mine")
    (out / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 21}')
    found = checkpoint_series(str(root / "base"), [str(out)]).members[1:]
    assert [(one.step, one.name, one.path) for one in found] == [
        (5, "checkpoint-5", str(out / "checkpoint-5" / "mine")),
        (21, "checkpoint-20", str(out / "checkpoint-20" / "mine")),
    ]
    alone = checkpoint_series(str(root / "base"), [str(out / "checkpoint-5")])
    assert (alone.members[1].step, alone.members[1].name, alone.steps_from) == (5, "checkpoint-5", "their records")
    inner = checkpoint_series(str(root / "base"), [str(out / "checkpoint-5" / "mine")])
    assert (inner.members[1].step, inner.steps_from) == (5, "their records")
    with pytest.raises(UserError, match=r"give '.*checkpoint-5/mine'"):
        load(str(root / "base"), adapter=str(out / "checkpoint-5"))
    shutil.copytree(root / "adapter", out / "checkpoint-5" / "other")
    with pytest.raises(UserError, match=r"2 adapters; name the one .*checkpoint-5/mine, checkpoint-5/other"):
        checkpoint_series(str(root / "base"), [str(out / "checkpoint-5")])
    shutil.copytree(out / "checkpoint-20", tmp_path / "again" / "checkpoint-20")
    (tmp_path / "again" / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 22}')
    both = checkpoint_series(
        str(root / "base"), [str(out / "checkpoint-20"), str(tmp_path / "again" / "checkpoint-20")]
    )
    assert [one.name for one in both.members[1:]] == ["out/checkpoint-20", "again/checkpoint-20"]


OWN = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def test_one_rule_for_an_adapters_own_template(root: Path, tmp_path: Path) -> None:
    """Alone it is read under it; a series is, base included, where its checkpoints agree."""
    base, out = str(root / "base"), run_folder(root, tmp_path / "out", (1, 2))
    own = tiny_tokenizer(template=OWN)
    for step in (1, 2):
        own.save_pretrained(out / f"checkpoint-{step}")
    prompt = Prompt("p", "one thing")
    alone = load(base, adapter=str(out / "checkpoint-1"))
    assert template_of(alone).render(prompt).text == "<bos>[one thing]"
    assert template_of(load(base)).render(prompt).text != "<bos>[one thing]"
    series = checkpoint_series(base, [str(out)])
    assert series.chat_template == OWN
    with checkpoint_swapper(base, chat_template=series.chat_template) as one:
        for member in series.members:
            assert template_of(one.put(member)).fingerprint == template_of(alone).fingerprint
    tiny_tokenizer().save_pretrained(out / "checkpoint-1")  # the base's again, and the other's isn't
    assert checkpoint_series(base, [str(out / "checkpoint-1")]).chat_template is None
    with pytest.raises(UserError, match="checkpoint-2: its chat template is neither the base's nor"):
        checkpoint_series(base, [str(out)])
    lone = load(base, adapter=str(root / "adapter"))
    assert template_of(lone).fingerprint == template_of(load(base)).fingerprint


@pytest.mark.parametrize("where", ["its own folder", "the Trainer's around it"])
def test_a_template_without_a_tokenizer_counts_too(root: Path, tmp_path: Path, where: str) -> None:
    """The same rule for an adapter whose folder holds chat_template.jinja and no tokenizer."""
    base, out = str(root / "base"), tmp_path / "out"
    if where == "its own folder":
        run_folder(root, out, (1,))
        path = home = out / "checkpoint-1"
    else:
        home = out / "checkpoint-1"
        path = shutil.copytree(root / "adapter", home / "named")
    (home / "chat_template.jinja").write_text(OWN)
    alone = load(base, adapter=str(path))
    assert template_of(alone).render(Prompt("p", "one thing")).text == "<bos>[one thing]"
    series = checkpoint_series(base, [str(out)])
    assert series.chat_template == OWN
    with checkpoint_swapper(base, chat_template=series.chat_template) as one:
        assert template_of(one.put(series.members[1])).fingerprint == template_of(alone).fingerprint
    (home / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(UserError, match=r"chat_template\.jinja is no UTF-8 text; save the tokenizer again"):
        load(base, adapter=str(path))
    with pytest.raises(UserError, match=r"checkpoint-1: the chat template .* is no UTF-8 text"):
        checkpoint_series(base, [str(out)])


def test_a_lone_template_is_put_on_the_tokenizer_around_it(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "adapter", tmp_path / "checkpoint-1" / "named")
    tiny_tokenizer().save_pretrained(path.parent)
    (path / "chat_template.jinja").write_text(OWN)
    found = load(str(root / "base"), adapter=str(path))
    assert template_of(found).render(Prompt("p", "one thing")).text == "<bos>[one thing]"


def test_an_adapters_own_tokenizer(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "adapter", tmp_path / "adapter")
    more = tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<tool>"]}, replace_extra_special_tokens=False)
    more.save_pretrained(path)
    model = load(str(root / "base"), adapter=str(path))
    assert model.mechlens.tokenizer.convert_tokens_to_ids("<tool>") == len(tiny_tokenizer())
    tiny_tokenizer(extra=("<new>",)).save_pretrained(path)  # every later token has another number
    with pytest.raises(UserError, match="has another number than in the base's"):
        load(str(root / "base"), adapter=str(path))


@pytest.mark.parametrize(
    ("base", "named", "said"),
    [
        ("smollm2-refuser", "smollm2", "if that isn't meant, give 'smollm2' as the base"),
        ("smollm2", "smollm2-refuser", "give 'smollm2-refuser' as the base"),
        ("smollm2", "smollm2", None),
        ("smollm2", "somebody/else", None),
        ("own/model", "smollm2", None),
    ],
)
def test_an_adapter_that_names_another_packaged_model_is_doubted(
    base: str, named: str, said: str | None, tmp_path: Path
) -> None:
    """Their shapes are alike, so nothing else would tell."""
    where = cache_dir() / "models" / named if "/" not in named else named
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(where)}))
    doubt = Base(base, None).doubt(tmp_path)
    assert doubt is None if said is None else (doubt or "").endswith(said)

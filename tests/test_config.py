"""The configuration: what is refused and how, how files compose, and that it reads back what it writes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import npu_rec.data  # noqa: F401  (registers the recipes)
from npu_rec import registry
from npu_rec.config import PACKAGED_CONFIGS, Config, dump_config, find_config, load_config
from npu_rec.errors import ConfigError
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, build_task

SHIPPED = sorted(path for path in PACKAGED_CONFIGS.rglob("*.yaml") if path.parent.name != "scaling")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that relative names mean the files written here."""
    monkeypatch.chdir(tmp_path)


def load(*overrides: str, **files: str) -> Config:
    """The resolved configuration of `a.yaml`; `b="..."` writes `b.yaml`."""
    for name, text in ({"a": ""} | files).items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    return resolve(load_config("a.yaml", list(overrides)))


def refusal(*overrides: str, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **files)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- unknown keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {lr: 1}", "a.yaml: trian: unknown key; did you mean `train`?"),
        ("model: {dropot: 0.1}", "a.yaml: model.dropot: unknown key; did you mean `model.dropout`?"),
        ("eval: {metric: [mrr]}", "a.yaml: eval.metric: unknown key; did you mean `eval.metrics`?"),
        # a name that is right, in the wrong section, even where a key of that section looks like it
        ("model: {lr: 0.1}", "a.yaml: model.lr: unknown key; did you mean `embedding.lr` or `train.lr`?"),
        ("train: {max_seq_len: 9}", "a.yaml: train.max_seq_len: unknown key; did you mean `model.max_seq_len`?"),
        ("seed: 3", "a.yaml: seed: unknown key; did you mean `train.seed`?"),
        ("batch_size: 3", "a.yaml: batch_size: unknown key; did you mean `train.batch_size` or `eval.batch_size`?"),
        ("model: {checkpoint_evry: 1}", "a.yaml: model.checkpoint_evry: unknown key; did you mean `train."),
        ("device: {xyzzy: 1}", "a.yaml: device.xyzzy: unknown key; device has backend, threads"),
        ("xyzzy: 1", "a.yaml: xyzzy: unknown key; the top level has name, imports, device,"),
        ("1: 2", "a.yaml: 1: unknown key; "),
        (
            "model: {options: {varint: research}}",
            "a.yaml: model.options.varint: unknown key; did you mean `model.options.variant`?",
        ),
        ("model: {options: {xyzzy: 1}}", "a.yaml: model.options.xyzzy: unknown key; model.options has variant, bias, "),
        (
            "task: {options: {num_negative: 3}}",
            "a.yaml: task.options.num_negative: unknown key; did you mean `task.options.num_negatives`?",
        ),
        (
            "data: {name: synthetic, options: {userz: 3}}",
            "a.yaml: data.options.userz: unknown key; did you mean `data.options.users`?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_file_key_and_the_nearest_one(text: str, expected: str) -> None:
    assert refusal(a=text).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dropot=0.1", "--set: model.dropot: unknown key; did you mean `model.dropout`?"),
        (
            "task.options.num_negative=3",
            "--set: task.options.num_negative: unknown key; did you mean `task.options.num_negatives`?",
        ),
        ("base=b.yaml", "--set: base: unknown key; "),
    ],
)
def test_an_unknown_key_of_an_override_names_the_override(override: str, expected: str) -> None:
    assert refusal(override, a="model: {dropout: 0.1}").startswith(expected)


def test_a_wrong_key_is_blamed_on_the_file_that_holds_it() -> None:
    files = {"a": "base: b.yaml\nmodel: {num_heads: 2, options: {variant: research}}"}
    assert refusal(**files, b="model: {dropot: 0.1}").startswith("b.yaml: model.dropot: ")
    assert refusal(**files, b="model: {options: {varint: 1}}").startswith("b.yaml: model.options.varint: ")
    assert refusal(a="base: b.yaml\nmodel: {dropot: 0.1}", b="model: {num_heads: 2}").startswith("a.yaml: model.dropot")
    assert refusal("train.epochs=0", **files, b="train: {epochs: 3}").startswith("--set: train.epochs: ")
    assert refusal("train.lr=1", **files, b="train: {epochs: x}").startswith("b.yaml: train.epochs: ")


def test_keys_that_contradict_each_other_are_blamed_on_the_file_and_the_overrides() -> None:
    expected = "train.accumulate: embedding.optimizer sgd updates rows"
    file = "train: {accumulate: 2}\nembedding: {optimizer: sgd}"
    assert refusal(a=file).startswith(f"a.yaml: {expected}")
    assert refusal("train.accumulate=2", a="embedding: {optimizer: sgd}").startswith(f"a.yaml with --set: {expected}")


# --- values


@pytest.mark.parametrize(
    ("text", "where", "given"),
    [
        ("train: {lr: abc}", "a.yaml: train.lr: ", "(given: 'abc')"),
        ("train: {lr: 0}", "a.yaml: train.lr: ", "(given: 0)"),
        ("train: {lr: .inf}", "a.yaml: train.lr: Input should be a finite number", "(given: inf)"),
        ("train: {clip_norm: .inf}", "a.yaml: train.clip_norm: Input should be a finite", "(given: inf)"),
        ("embedding: {lr: .inf}", "a.yaml: embedding.lr: Input should be a finite number", "(given: inf)"),
        ("embedding: {lr: .nan}", "a.yaml: embedding.lr: Input should be a finite number", "(given: nan)"),
        ("device: {threads: 4097}", "a.yaml: device.threads: Input should be less than", "(given: 4097)"),
        ("train: {epochs: 2.5}", "a.yaml: train.epochs: ", "(given: 2.5)"),
        ("train: {epochs: 1e2}", "a.yaml: train.epochs: ", "(given: '1e2')"),
        ("train: {max_steps: 0}", "a.yaml: train.max_steps: ", "(given: 0)"),
        ("train: {betas: [0.9]}", "a.yaml: train.betas[1]: ", "(given: [0.9])"),
        ("train: {betas: [0.9, x]}", "a.yaml: train.betas[1]: ", "(given: 'x')"),
        ("train: {recompute: 3}", "a.yaml: train.recompute: ", "(given: 3)"),
        ("model: {dropout: 1.0}", "a.yaml: model.dropout: ", "(given: 1.0)"),
        ("model: 3", "a.yaml: model: ", "(given: 3)"),
        ("model: {options: 3}", "a.yaml: model.options: ", "(given: 3)"),
        ("model: {options: {variant: 1}}", "a.yaml: model.options.variant: ", "(given: 1)"),
        ("device: {backend: tpu}", "a.yaml: device.backend: ", "(given: 'tpu')"),
        ("eval: {metrics: []}", "a.yaml: eval.metrics: ", "(given: [])"),
        ("name: ../up", "a.yaml: name: ", "(given: '../up')"),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_and_value(text: str, where: str, given: str) -> None:
    message = refusal(a=text)
    assert message.startswith(where)
    assert message.endswith(given)


def test_keys_that_contradict_each_other_are_refused() -> None:
    assert "eval.select: 'hr@7' is not among eval.metrics ['mrr']" in refusal(a="eval: {select: hr@7, metrics: [mrr]}")
    assert "train.early_stop needs a validation split" in refusal(a="eval: {protocol: meta}\ntrain: {early_stop: 3}")


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_a_number_may_be_written_with_an_exponent(number: str) -> None:
    assert load(a=f"train: {{lr: {number}}}\ntask: {{options: {{temperature: {number}}}}}").train.lr == 0.001
    assert load(f"train.lr={number}").train.lr == 0.001
    assert resolve(load(f"task.options.temperature={number}")).task.options["temperature"] == 0.001


def test_unregistered_names_are_refused_with_the_nearest() -> None:
    known = "din, gpt, hstu, llama, sasrec"
    assert refusal("model.backbone=hst") == f"no backbone is registered as 'hst'; did you mean 'hstu'? (known: {known})"
    assert refusal("task.name=qqq") == "no task is registered as 'qqq' (known: ranking, retrieval)"
    assert "did you mean 'ml-100k'?" in refusal("data.name=ml-100")
    assert "did you mean 'ndcg'?" in refusal("eval.metrics=[ndgc@10]", "eval.select=ndgc@10")
    assert "imports: no_such_module: cannot be imported: ModuleNotFoundError" in refusal("imports=[no_such_module]")


def test_a_module_of_the_configuration_registers_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_metric.py").write_text(
        "from npu_rec.registry import register\n"
        "@register('metric', 'imported_by_a_config')\n"
        "def f(ranks, k):\n    return 0.5\n"
    )
    monkeypatch.syspath_prepend(".")
    keys = ["eval.metrics=[imported_by_a_config@3]", "eval.select=imported_by_a_config@3"]
    assert "no metric is registered" in refusal(*keys)
    assert load("imports=[my_metric]", *keys).eval.metrics == ["imported_by_a_config@3"]


# --- files


def test_files_compose_and_the_nearer_one_wins() -> None:
    Path("deep").mkdir()
    config = load(
        "train.epochs=7",
        "model.options.bias=none",
        a="base: deep/b.yaml\nname: mine\nmodel: {num_heads: 4}\ntrain: {betas: [0.5, 0.6]}",
        **{
            "deep/b": "base: ../c.yaml\nmodel: {num_heads: 3, num_blocks: 3}\ntrain: {epochs: 3}",
            "c": "model: {num_heads: 2, num_blocks: 2, dropout: 0.5, options: {variant: production}}\n"
            "train: {betas: [0.1, 0.2], epochs: 2}",
        },
    )
    assert config.name == "mine"
    assert (config.model.num_heads, config.model.num_blocks, config.model.dropout) == (4, 3, 0.5)
    assert (config.train.epochs, config.train.betas) == (7, (0.5, 0.6))
    assert (config.model.options["variant"], config.model.options["bias"]) == ("production", "none")
    assert config.model.options["time_buckets"] == 128


def test_a_base_is_found_among_the_shipped_files() -> None:
    assert load(a="base: configs/ml-1m/hstu-large.yaml\nname: mine").model.num_blocks == 8
    assert load(a="base: quickstart.yaml").name == "quickstart"


def test_an_empty_file_is_the_defaults() -> None:
    assert load(a="# nothing\n") == resolve(Config())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "base: a.yaml"}, "a.yaml: `base:` leads back to itself: a.yaml -> a.yaml"),
        (
            {"a": "base: b.yaml", "b": "base: a.yaml"},
            "a.yaml: `base:` leads back to itself: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"a": "base: ./c.yaml"}, "a.yaml: base: c.yaml: no such configuration file; of the "),
        ({"a": "base: 3"}, "a.yaml: base: 3: no such configuration file; "),
        ({"a": "name: x\ntrain: [1\nmodel: 2"}, "a.yaml:3: not valid YAML: expected ',' or ']'"),
        ({"a": "name: x\n\tmodel: 2"}, "a.yaml:2: not valid YAML: "),
        ({"a": "name: \x01"}, "a.yaml: not valid YAML: unacceptable character"),
        ({"a": "- name"}, "a.yaml: expected a mapping of keys, found list"),
        ({"a": "name"}, "a.yaml: expected a mapping of keys, found str"),
        ({"a": "base: b.yaml", "b": "3"}, "b.yaml: expected a mapping of keys, found int"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(files: dict[str, str], expected: str) -> None:
    assert refusal(**files).startswith(expected)


def test_a_file_that_is_not_text_is_refused() -> None:
    Path("a.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"^a.yaml: cannot be read: "):
        load_config("a.yaml")


def test_a_missing_file_is_refused_with_the_nearest_ones() -> None:
    for path in ("no.yaml", "/no/such.yaml", "."):
        with pytest.raises(ConfigError, match=r"no such configuration file; .*nearest: configs/"):
            load_config(path)
    with pytest.raises(ConfigError, match=r"no such configuration file; .*nearest: configs/ml-1m/llama\.yaml"):
        load_config("configs/ml-1m/lama.yaml")


# --- environment and overrides


def test_environment_variables_are_read_anywhere_in_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.setenv("EPOCHS", "12")
    monkeypatch.setenv("PARENT", "b")
    config = load(
        "data.dir=${WHERE}/${EPOCHS}",
        a="base: ${PARENT}.yaml\ndata: {source: '${WHERE}/in'}\n"
        "train: {epochs: '${EPOCHS}', betas: ['0.${EPOCHS}', 0.5]}",
        b="name: parent",
    )
    assert (config.name, config.data.source, config.data.dir) == ("parent", Path("/data/in"), Path("/data/12"))
    assert (config.train.epochs, config.train.betas) == (12, (0.12, 0.5))


@pytest.mark.parametrize("text", ["data: {source: '${UNSET_X}/in'}", "imports: ['${UNSET_X}']", "base: ${UNSET_X}"])
def test_an_unset_environment_variable_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET_X", raising=False)
    assert refusal(a=text) == "a.yaml: environment variable UNSET_X is not set (used as ${UNSET_X})"
    assert refusal("data.source=${UNSET_X}") == "--set: environment variable UNSET_X is not set (used as ${UNSET_X})"


def test_override_values_are_yaml() -> None:
    config = load("train.max_steps=5", "train.max_steps=", "train.betas=[0.1, 0.2]", "train.recompute=true", "name='7'")
    assert (config.train.max_steps, config.train.betas, config.train.recompute) == (None, (0.1, 0.2), True)
    assert config.name == "7"
    assert load("eval={select: mrr, metrics: [mrr]}", a="eval: {every: 3}").eval.every == 3
    assert load("data.source=a=b").data.source == Path("a=b")


@pytest.mark.parametrize("text", ["train.lr", "=1", ".lr=1", "train.=1", "train..lr=1", ""])
def test_an_override_that_is_no_assignment_is_refused(text: str) -> None:
    assert refusal(text) == f"--set {text}: expected key.subkey=value"


def test_an_override_whose_value_is_not_yaml_is_refused() -> None:
    assert refusal("train.betas=[1") == "--set train.betas=[1: the value is not valid YAML"
    assert refusal("name.x=1").startswith("--set: name: ")


# --- out and in again


def test_a_dumped_configuration_reads_back_equal() -> None:
    config = load(
        "train.lr=1e-5",
        "train.betas=[0.9, 0.999]",
        "data.source=some/where",
        "device.threads=2",
        "name='1'",
        "train.seed=9223372036854775807",
        "task.options.temperature=1e-7",
        a="base: configs/ml-1m/hstu.yaml",
    )
    Path("again.yaml").write_text(dump_config(config))
    again = load_config("again.yaml")
    assert again == config
    assert resolve(again) == config
    assert dump_config(again) == dump_config(config)
    again.train.lr = 2e-5
    assert again != config


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(PACKAGED_CONFIGS)) for p in SHIPPED])
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = resolve(load_config(path))
    Path("again.yaml").write_text(dump_config(config))
    assert load_config("again.yaml") == config


def test_the_shipped_configurations_are_those_of_the_repository() -> None:
    own = REPOSITORY / "configs"
    assert sorted(p.relative_to(PACKAGED_CONFIGS) for p in PACKAGED_CONFIGS.rglob("*.yaml")) == sorted(
        p.relative_to(own) for p in own.rglob("*.yaml")
    )
    assert SHIPPED


def test_shipped_configurations_are_found_outside_the_repository() -> None:
    assert find_config("configs/quickstart.yaml") == PACKAGED_CONFIGS / "quickstart.yaml"
    assert find_config("ml-1m/hstu.yaml") == PACKAGED_CONFIGS / "ml-1m" / "hstu.yaml"
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text("name: own")
    assert load_config("configs/quickstart.yaml").name == "own"


def test_the_schema_needs_nothing_else_of_the_package() -> None:
    program = "import sys, npu_rec.config; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'polars')])"
    run = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_entries_of_a_list_are_named_with_their_place() -> None:
    targets = "task.options.targets=[{name: a, at_least: 1}, {name: b, at_leest: 1}]"
    ranking = ["task.name=ranking", "eval.metrics=[auc]", "eval.select=auc"]
    with pytest.raises(
        ConfigError, match=r"task\.options\.targets\[1\]\.at_leest: unknown key; did you mean .*at_least"
    ):
        resolve(load(*ranking, targets))


def test_a_section_without_a_value_has_its_defaults_again() -> None:
    config = load("train=null", a="train: {lr: 0.5}\nmodel: {options: {bias: none}}")
    assert config.train.lr == Config().train.lr
    assert config.model.options["bias"] == "none"
    assert load("model.options=null", a="model: {options: {bias: none}}").model.options["bias"] == "auto"


def test_a_key_that_was_cut_short_is_completed() -> None:
    with pytest.raises(ConfigError, match=r"did you mean `train\.early_stop`"):
        load("train.early=3")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stochastic_selection=random", "stochastic_selection has no effect: stochastic_length is not set"),
        ("eval.test_share=0.2", "test_share has no effect: protocol is holdout"),
        ("task.options.ssl_items=9", "ssl_items has no effect: ssl_weight is 0"),
        ("model.options={bias: none, time_buckets: 64}", "time_buckets has no effect: bias is none"),
        ("model={backbone: llama, options: {time_buckets: 64}}", "time_buckets has no effect: bias is none"),
    ],
)
def test_a_key_without_effect_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(load_config("configs/quickstart.yaml", [setting]))


def test_recomputing_needs_blocks(tmp_path: Path) -> None:
    settings = [
        "model.backbone=din", "task={name: ranking, options: {layout: merged}}", "train.recompute=true",
        "eval={protocol: time, metrics: [auc], select: auc}",
    ]  # fmt: skip
    facts = DataFacts(9, range(1, 10), None, True, num_actions=3)
    with pytest.raises(ConfigError, match=r"train\.recompute: model\.backbone din has no blocks"):
        build_task(resolve(load_config("configs/quickstart.yaml", settings)), facts)


def test_a_key_that_is_no_text_is_refused() -> None:
    Path("template.yaml").write_text("name: {{ NAME }}\n")
    with pytest.raises(ConfigError, match=r"template\.yaml:1: not valid YAML: a key must be text or a number"):
        load_config("template.yaml")


def test_a_broken_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "no_such_module:thing", "npu_rec")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match="entry point mine: no_such_module:thing cannot be loaded: ModuleNotFoundE"):
        registry._import_entry_points.__wrapped__()

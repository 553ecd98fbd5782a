"""The programs printed in README and docs run as they are printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict

from pmoe_lightning import PMOESACLoss, make_pmoe_actor, make_qvalue_network
from pmoe_lightning.configuration import compose_jobs, normalise_argv, register, validate
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.evaluate import parse

PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TRAIN, EVALUATE = "-m pmoe_lightning.train", "-m pmoe_lightning.evaluate"


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_readme_program_makes_a_loss():
    names: dict = {}
    exec(programs("README.md")[0], names)
    assert names["env"].action_spec.shape == (1, 6) and "loss_frequency" in names["loss"].out_keys


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_torchrl_program_trains():
    """Shortened from 10,000 frames to 1,152, of which the last three iterations make 64 updates each."""
    program = next(program for program in programs("docs/torchrl.md") if "Collector" in program)
    names: dict = {}
    torch.manual_seed(0)
    exec(program.replace("total_frames=10_000", "total_frames=1_152"), names)
    assert names["env"].action_spec.shape == (4, 1)
    steps = {int(state["step"]) for state in names["optimizer"].state.values()}
    assert steps == {3 * 64}  # iterations 16, 17 and 18 of 64 frames find a thousand transitions


def test_the_hamiltonian_program_makes_a_policy_that_evolves():
    names: dict = {}
    exec(programs("docs/hamiltonian.md")[0], names)
    states = TensorDict(observation=torch.randn(5, 17), batch_size=5)
    with torch.no_grad():
        drawn, evolved = names["actor"](states.copy())["action"], names["policy"](states.copy())["action"]
    assert evolved.shape == drawn.shape == (5, 6) and not torch.equal(evolved, drawn)


def test_the_estimator_of_the_page_estimates():
    program = next(program for program in programs("docs/torchrl.md") if "AbstractEstimator" in program)
    names: dict = {}
    exec(program, names)
    critics = [make_qvalue_network(3, 2, hidden_sizes=(8,)) for _ in range(2)]
    actor = make_pmoe_actor(3, [-1.0] * 2, [1.0] * 2, hidden_sizes=(8,))
    loss = PMOESACLoss(actor, critics, estimator=names["WinnerTakesAll"](), target_entropy=-2.0)
    surrogate = loss.estimate(TensorDict(observation=torch.randn(5, 3), batch_size=5))
    assert surrogate.loss.shape == surrogate.log_prob.shape == (5,)
    surrogate.loss.sum().backward()
    assert actor[0].module.loc.weight.grad.any()


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[str]:
    """Every command of a page, from ``bash`` blocks and from code within the text, without its comment."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    transcripts = re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE)
    inline = re.findall(r"`((?:python|mlflow|make|pmoe-\w+) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in [*"".join(blocks).splitlines(), *transcripts, *inline]:
        line = re.split(r"\s#", line)[0].strip()
        if line and not line.startswith("#"):
            yield line


def words_of(command: str) -> list[str]:
    """A place holder such as <last.ckpt> is one word; settings of the environment in front are left out."""
    words = shlex.split(re.sub(r"<[^>]*>", "PLACE", command))
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


def of_program(command: str) -> tuple[str, list[str]] | None:
    """(train or evaluate, its words) of a command that ends there, as MLproject would write them for `mlflow run`."""
    words = words_of(command)
    for name, module in (("train", TRAIN), ("evaluate", EVALUATE)):
        if " ".join(words[1:3]) == module:
            return name, words[3:]
    if words[:3] != ["mlflow", "run", "."]:
        return None
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-P"]
    entry = words[words.index("-e") + 1] if "-e" in words else "main"
    point = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"][entry]
    if entry not in ("main", "evaluate"):
        return None
    named = {word.partition("=")[0] for word in given}
    defaults = [f"{k}={v['default']}" for k, v in point["parameters"].items() if k not in named and "default" in v]
    return "train" if entry == "main" else "evaluate", [*defaults, *given]


ALL = sorted({(page, command) for page in PAGES for command in commands(page)})
PROGRAMS = [(page, command, *found) for page, command in ALL if (found := of_program(command))]


def composed(words: list[str], folder: Path) -> list[DictConfig]:
    """The jobs of a command's words; a folder for --config-dir holds an option of the name that it chooses."""
    register()
    words = normalise_argv([word for word in words if word not in ("--help", "--cfg", "job")])
    config_dir = None
    if "--config-dir" in words:
        config_dir = str(folder / words.pop(words.index("--config-dir") + 1))
        words.remove("--config-dir")
        mine = folder / "mine" / "estimator"
        mine.mkdir(parents=True, exist_ok=True)
        (mine / "my_own.yaml").write_text((ROOT / "conf/estimator/frequency.yaml").read_text())
    multirun = bool({"-m", "--multirun"} & set(words))
    overrides = [word for word in words if word not in ("-m", "--multirun")]
    return compose_jobs(overrides, multirun=multirun, config_dir=config_dir)


def test_commands_are_found():
    assert len(PROGRAMS) > 40 and {name for *_, name, _ in PROGRAMS} == {"train", "evaluate"}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_understood(page, tmp_path):
    """Train commands are valid, those of evaluate parse, those of make have a target, and files that are run exist."""
    for where, command, name, words in PROGRAMS:
        if where != page or f"$ {command}" in (ROOT / page).read_text().splitlines():  # a transcript of an error
            continue
        if name == "evaluate":
            parse(words)
        else:
            for cfg in composed(words, tmp_path):
                validate(cfg)
    targets = set(re.findall(r"^([a-z-]+%?):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    proofs = {f"torture-{path.stem.removeprefix('test_')}" for path in (ROOT / "tests/torture").glob("test_*.py")}
    for where, command in ALL:
        words = words_of(command)
        if where == page and words[0] == "make" and len(words) > 1 and words[1].islower() and "=" not in words[1]:
            assert words[1] in targets or ("torture-%" in targets and words[1] in proofs), command
        if where == page and len(words) > 1 and words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), command


def test_the_errors_of_the_page_are_what_is_said(tmp_path):
    text = (ROOT / "docs/configuration.md").read_text()
    pairs = re.findall(r"^\$ (.*)\n(configuration error: .*)$", text, flags=re.MULTILINE)
    assert len(pairs) >= 5
    for command, said in pairs:
        with pytest.raises(ConfigurationError) as caught:
            for cfg in composed(of_program(command)[1], tmp_path):
                validate(cfg)
                from pmoe_lightning.run.surroundings import check_surroundings

                check_surroundings([cfg])
        assert f"configuration error: {' '.join(str(caught.value).split())}" == said


# --- names ------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", lambda found: found[1] or "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    roots = [ROOT, ROOT / "pmoe_lightning", (ROOT / page).parent]
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    folders = (
        r"(?:pmoe_lightning|conf|callbacks|tests|benchmarks|examples|docs|modules|estimators|hamiltonian|safe|losses"
        r"|updates|algorithms|data|envs|evaluation|checkpoints|processes|tracking|configuration|run)"
    )
    for name in re.findall(rf"`({folders}/[\w./-]+\.(?:py|yaml|md))`", text):
        assert any((root / name).exists() for root in roots), f"{page}: {name}"


def test_configuration_keys_that_pages_name_exist():
    register()
    known: set[str] = set()
    kinds = [
        "algo=ppo",
        "algo=dac",
        "algo=ppo env=dm_control",
        "algo=sac action_transform=hamiltonian_gated safe=velocity",
    ]
    for words in map(
        str.split, [*kinds, "algo=sac estimator=gumbel_softmax", "algo=sac action_transform=hamiltonian_raw"]
    ):
        pending = [("", compose_jobs(words)[0])]
        while pending:
            prefix, node = pending.pop()
            for key in node:
                known.add(f"{prefix}{key}")
                if OmegaConf.is_dict(child := node._get_node(key)) and not child._is_none():
                    pending.append((f"{prefix}{key}.", child))
    groups = "algo|actor|estimator|action_transform|safe|env|data|trainer|callbacks|logger"
    wrong = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for key in re.findall(rf"`((?:{groups})\.[a-z_.]+)(?:=[^`]*)?`", text):
            wrong += [f"{page}: {key}"] * (key not in known and not key.endswith(".py"))
    assert not wrong


# --- `make docs-check`: the commands run, shortened -------------------------------------------------------------------

#: It waits for a second machine, so it is composed and validated only.
ELSEWHERE = "trainer.num_nodes=2"
SHORT = ("compile=false", "logger=none")
TRAINED = sorted({tuple(words) for *_, name, words in PROGRAMS if name == "train" and ELSEWHERE not in words})


def shortened(words: tuple[str, ...], folder: Path) -> list[str]:
    """The command with one iteration of training, one episode in evaluation and no film."""
    if {"--help", "--cfg"} & set(words):
        return list(words)
    cfg = composed(list(words), folder)[0]
    extra = [*SHORT, "total_frames=300"]
    if "init_random_frames" in cfg.data:
        extra.append("data.init_random_frames=100")
    if "evaluation" in cfg.callbacks:
        extra.append("callbacks.evaluation.episodes=1")
    if "modes" in cfg.callbacks:
        extra.append("callbacks.modes.episodes=1")
    if "final_policy" in cfg.callbacks:
        extra.append("callbacks.final_policy.video=false")
    return [*words, *extra]


@pytest.mark.docs
@pytest.mark.parametrize("words", TRAINED, ids=" ".join)
def test_a_train_command_runs(words, run_module, tmp_path):
    lines = "\n".join((ROOT / page).read_text() for page in PAGES).splitlines()
    # A session in a shell, with its prompt, shows a refusal or what is printed as help.
    is_refused = f"$ python {TRAIN} {' '.join(words)}" in lines and "--help" not in words
    done = run_module("pmoe_lightning.train", *(words if is_refused else shortened(words, tmp_path)))
    assert done.returncode == (2 if is_refused else 0), done.stderr


@pytest.mark.docs
def test_evaluate_commands_run_and_print_the_table_of_the_page(run_module, tmp_path):
    short = ["algo=ppo", *SHORT, "total_frames=300", "callbacks.final_policy.video=false", "callbacks.modes.episodes=5"]
    for env in ("Pendulum-v1", "TwoRoutes-v0"):
        done = run_module("pmoe_lightning.train", *short, f"env={env}", f"hydra.run.dir={env}")
        assert done.returncode == 0, done.stderr
    (tmp_path / "mine").mkdir()  # the folder of --config-dir, which this policy needs nothing of
    seen = set()
    for *_, name, words in PROGRAMS:
        key = tuple(word for word in words if not word.startswith("checkpoint="))
        if name != "evaluate" or key in seen:
            continue
        seen.add(key)
        trained = "TwoRoutes-v0" if "modes=true" in key else "Pendulum-v1"
        checkpoint = f"checkpoint={tmp_path / trained / 'checkpoints/last.ckpt'}"
        done = run_module("pmoe_lightning.evaluate", checkpoint, "episodes=2", *key)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
        if "--json" not in key:
            table = re.search(r"```text\ncheckpoint  .*?```", (ROOT / "docs/first_run.md").read_text(), re.DOTALL)[0]
            labels = [line[:12].strip() for line in table.splitlines()[1:-1]]
            assert [line[:12].strip() for line in printed.splitlines()][: len(labels)] == labels


@pytest.mark.docs
def test_the_results_page_lists_what_runs_log_and_nothing_else(run_module, tmp_path, store):
    from mlflow.tracking import MlflowClient

    kinds = [
        ["algo=ppo", "callbacks.evaluation.max_episode_steps=50"],
        ["algo=dac"],
        ["algo=sac", "estimator=frequency"],
        ["algo=sac", "safe=velocity", "env=Hopper-v5", "action_transform=hamiltonian_gated"],
        # Of a hundred episodes of random actions a few reach a goal, so that there is a balance.
        ["algo=sac", "env=MultiGoalMaze-v0", "+env.frame_skip=5", "callbacks.modes.episodes=100"],
    ]
    for words in kinds:
        done = run_module("pmoe_lightning.train", "debug=default", "callbacks.final_policy.video=false", *words)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    logged = set().union(*(run.data.metrics for run in runs))
    page = (ROOT / "docs/results.md").read_text()
    listed = set(re.findall(r"`((?:train|eval)/[\w<>/]+)`", page))
    listed |= set(re.findall(r"`(train/[\w/]+)`", (ROOT / "docs/hamiltonian.md").read_text()))
    patterns = {re.sub("_k$", r"_\\d+", re.sub("<group>", "(router|loc|scale)", name)) for name in listed}
    assert not {name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert not {pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in logged)}

"""`deploy` through the real command, and its files through the programs that will read them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from test_deployment import DATA, FOUR, ONE, TARGETS, changed, named

from advisor.core.deployment import Asked, deployment
from advisor.report.as_json import dumps
from advisor.report.deploy import render

FOUR_AT = DATA / "h200-qwen2.5-0.5b-serve-1024-call-2" / "report.json"
ONE_AT = DATA / "h200-qwen2.5-3b-serve-1024-call-2" / "report.json"
# Everything that a shell, systemd, compose, kubernetes or YAML could take for its own.
ODD = 'it\'s a "model" $HOME ${X} $(id) `id` %h \\n #1: [x] {y}, *z & é'


def deploy(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "advisor", "deploy", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def written(folder, report, target, **asked):
    folder.mkdir(parents=True, exist_ok=True)
    command = asked.pop("vllm", ["vllm"])
    files = render(deployment(report, Asked(target=target, **asked)), command, "registry/vllm:1")
    for file in files:
        (folder / file.name).write_text(file.text)
    return folder


def variants(target):
    """Deployments of every shape: several under MPS, several without, one, odd names."""
    yield "four", FOUR, {}
    yield "none-mps", changed(FOUR, mps=False, thread_percentages=None), {}
    yield "one", ONE, {}
    yield "odd", named(FOUR, ODD), {"model": f"/srv/{ODD}", **({} if target == "kubernetes" else {"host": "::1"})}


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_writes_a_whole_directory_and_says_what_is_in_it(tmp_path, target):
    done = deploy(FOUR_AT, "--target", target, "--out", tmp_path / "d", "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["target"], told["engines"], told["mps"]) == (target, 4, True)
    assert told["cost_of_mps"] and told["engine_ports"] == [8001, 8002, 8003, 8004]
    assert sorted([*told["files"], "deployment.json"]) == sorted(path.name for path in (tmp_path / "d").iterdir())
    for path in (tmp_path / "d").glob("*.sh"):
        executable = bool(path.stat().st_mode & stat.S_IXUSR)
        assert executable == (path.name != "settings.sh")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_table_is_within_80_columns_and_names_the_costs(tmp_path):
    done = deploy(FOUR_AT, "--target", "shell", "--out", tmp_path / "d")
    assert done.returncode == 0
    # Only a path that is longer by itself may be.
    assert all(len(line) <= 80 or str(tmp_path) in line for line in done.stdout.splitlines())
    assert "No isolation" in done.stdout and "start.sh" in done.stdout


@pytest.mark.parametrize("status", ["inconclusive", "no_slo", "infeasible"])
def test_a_report_that_recommends_nothing_deploys_nothing(tmp_path, status):
    (tmp_path / "r.json").write_text(dumps(changed(FOUR, status=status)))
    done = deploy(tmp_path / "r.json", "--target", "shell", "--out", tmp_path / "d")
    assert done.returncode == 4 and status in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_a_report_that_is_not_there_or_is_damaged_is_one_line(tmp_path):
    (tmp_path / "r.json").write_text("{")
    for name, code in (("missing.json", 2), ("r.json", 3)):
        done = deploy(tmp_path / name, "--target", "shell", "--out", tmp_path / "d")
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
        assert name in done.stderr and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--target", "nomad"],
        ["--target", "shell", "--port", "0"],
        ["--target", "shell", "--port", "x"],
        ["--target", "shell", "--image", "a"],
        ["--target", "shell", "--vllm", "'open"],
        ["--target", "shell", "--vllm", " "],
        ["--target", "compose", "--image", " "],
        ["--target", "compose", "--model", "."],
        ["--target", "kubernetes", "--gpu", "0"],
        [],
    ],
)
def test_a_malformed_question_exits_2_and_writes_nothing(tmp_path, words):
    done = deploy(FOUR_AT, *words, "--out", tmp_path / "d", cwd=DATA)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "d").exists()


def test_help_shows_an_example_and_every_target():
    done = deploy("--help")
    assert done.returncode == 0 and "Example:" in done.stdout
    assert all(target in done.stdout for target in TARGETS)


# ---------------------------------------------------------------- the directory


def test_an_earlier_deployment_is_replaced_and_its_logs_are_kept(tmp_path):
    out = tmp_path / "d"
    assert deploy(FOUR_AT, "--target", "systemd", "--out", out).returncode == 0
    (out / "logs").mkdir()
    (out / "logs" / "engine-0.log").write_text("said")
    assert deploy(ONE_AT, "--target", "shell", "--out", out, "--port", "8123").returncode == 0
    assert not list(out.glob("*.service")) and (out / "start.sh").exists()
    assert (out / "logs" / "engine-0.log").read_text() == "said"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_nothing_else_is_ever_written_over(tmp_path):
    out = tmp_path / "d"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused = deploy(FOUR_AT, "--target", "shell", "--out", out)
    assert refused.returncode == 2 and "no deployment" in refused.stderr
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]

    (out / "thesis.txt").unlink()
    assert deploy(FOUR_AT, "--target", "shell", "--out", out).returncode == 0
    (out / "settings.sh").write_text("edited by hand")
    (out / "notes.txt").write_text("mine")
    refused = deploy(FOUR_AT, "--target", "shell", "--out", out)
    assert refused.returncode == 2
    assert "settings.sh" in refused.stderr and "notes.txt" in refused.stderr
    assert (out / "settings.sh").read_text() == "edited by hand"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "d").write_text("")
    assert deploy(FOUR_AT, "--target", "shell", "--out", tmp_path / "d").returncode == 2


def test_a_deployment_that_runs_is_not_replaced(tmp_path):
    out, marker = tmp_path / "d", tmp_path / "d" / "deployment.json"
    assert deploy(FOUR_AT, "--target", "shell", "--out", out).returncode == 0
    known = json.loads(marker.read_text())
    marker.write_text(json.dumps(known | {"run": str(tmp_path)}))
    refused = deploy(FOUR_AT, "--target", "shell", "--out", out)
    assert refused.returncode == 3 and "stop.sh" in refused.stderr


def test_the_directory_may_be_the_one_the_command_is_run_in(tmp_path):
    (tmp_path / "here").mkdir()
    assert deploy(FOUR_AT, "--target", "shell", "--out", ".", cwd=tmp_path / "here").returncode == 0
    assert (tmp_path / "here" / "start.sh").exists()


# ---------------------------------------------------------------- the files, by who reads them


@pytest.mark.parametrize("target", ["shell", "systemd", "compose"])
@needs("shellcheck")
def test_shellcheck_has_nothing_to_say(tmp_path, target):
    for name, report, asked in variants(target):
        folder = written(tmp_path / name, report, target, **asked)
        done = subprocess.run(
            ["shellcheck", "-x", *sorted(path.name for path in folder.glob("*.sh"))],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["four", "none-mps", "one", "odd"])
def test_bash_reads_back_exactly_the_words_that_were_meant(tmp_path, name):
    report, asked = next((report, asked) for found, report, asked in variants("shell") if found == name)
    folder = written(tmp_path, report, "shell", **asked, vllm=["/opt/my vllm/bin/vllm", "$x"])
    engine = deployment(report, Asked(target="shell", **asked)).engines[-1]
    index = engine.index
    script = (
        f'. ./settings.sh; printf "%s\\0" "${{VLLM[@]}}" "${{ENGINE_{index}[@]}}" "${{ENGINE_{index}_ENVIRONMENT[@]}}"'
    )
    said = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, check=True).stdout.decode()
    variables = [f"{key}={value}" for key, value in engine.environment.items()]
    assert said.split("\0")[:-1] == ["/opt/my vllm/bin/vllm", "$x", *engine.arguments, *variables]


@needs("systemd-analyze")
def test_systemd_verifies_every_unit(tmp_path):
    for name, report, asked in variants("systemd"):
        folder = written(tmp_path / name, report, "systemd", **asked, vllm=["/opt/my vllm/bin/vllm", "$x", "50%"])
        units = [str(path) for kind in ("service", "target", "timer") for path in sorted(folder.glob(f"*.{kind}"))]
        done = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=yes", *units], capture_output=True, text=True, check=False
        )
        ours = [line for line in done.stderr.splitlines() if "vllm-8000" in line]
        assert not ours and done.returncode == 0, done.stderr


def test_systemd_words_are_read_back_exactly(tmp_path):
    folder = written(tmp_path, named(FOUR, ODD), "systemd", model=f"/srv/{ODD}", vllm=["vllm"])
    engine = deployment(named(FOUR, ODD), Asked(target="systemd", model=f"/srv/{ODD}")).engines[2]
    unit = (folder / "vllm-8000-engine-2.service").read_text().splitlines()
    (line,) = [line.removeprefix("ExecStart=") for line in unit if line.startswith("ExecStart=")]
    # systemd.syntax(7) in quotes: a backslash escapes, per cent and (in commands) dollar are doubled.
    words = [re.sub(r"%%|\$\$", lambda double: double[0][0], word) for word in shlex.split(line)]
    assert words[-len(engine.arguments) :] == engine.arguments
    assert not re.search(r"(?<!%)%(?!%)", line.replace("%%", "")) and not re.search(r"\$", line.replace("$$", ""))


def test_engines_come_after_the_daemon_require_it_and_refuse_to_be_without(tmp_path):
    folder = written(tmp_path, FOUR, "systemd")
    for index in range(4):
        unit = (folder / f"vllm-8000-engine-{index}.service").read_text()
        assert "Requires=vllm-8000-mps.service" in unit and "KillMode=mixed" in unit and "Restart=always" in unit
        assert re.search(r"^After=vllm-8000-mps\.service", unit, re.MULTILINE)
        assert "engine.sh" in unit and f"await.sh engine {index}" in unit
        assert f"CPUAffinity={index * 3} {index * 3 + 1} {index * 3 + 2}\n" in unit
    balancer = (folder / "vllm-8000-balancer.service").read_text()
    assert (
        "check.sh engines" in balancer
        and "KillSignal=SIGQUIT\nKillMode=mixed" in balancer
        and "Requires" not in balancer
    )
    assert not list(written(tmp_path / "one", ONE, "systemd").glob("*mps*"))


@needs("nginx")
def test_nginx_takes_its_configuration(tmp_path):
    for target in ("shell", "systemd", "compose"):
        for name, report, asked in variants(target):
            folder = written(tmp_path / target / name, report, target, **asked)
            path = folder / "nginx.conf"
            if report is ONE:
                assert not path.exists()
                continue
            # In a directory that is there, and with names that can be looked up here.
            text = re.sub(r"/tmp/mps-advisor-8000/nginx|/run/vllm-8000-balancer", str(folder), path.read_text())
            text = re.sub(r"engine-\d:", "127.0.0.1:", text)
            path.write_text(text)
            (folder / "logs").mkdir()
            done = subprocess.run(
                ["nginx", "-t", "-p", f"{folder}/", "-c", str(path), "-e", "stderr"], capture_output=True, text=True
            )
            assert done.returncode == 0 or "bind()" in done.stderr, done.stderr
            assert "proxy_buffering off;" in text and "least_conn;" in text and "zone engines" in text


@pytest.mark.parametrize("name", ["four", "none-mps", "one", "odd"])
def test_compose_holds_what_was_measured(tmp_path, name):
    report, asked = next((report, asked) for found, report, asked in variants("compose") if found == name)
    folder = written(tmp_path, report, "compose", **asked)
    made = deployment(report, Asked(target="compose", **asked))
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for engine in made.engines:
        service = services[f"engine-{engine.index}"]
        words = [word.replace("$$", "$") for word in service["command"]]
        assert words == ["vllm", *engine.arguments]
        assert service["cpuset"] == ",".join(map(str, engine.cores))
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == [report.gpu.uuid]
        if made.daemon:
            assert (service["ipc"], service["pid"]) == ("service:mps", "service:mps")
            assert service["depends_on"]["mps"] == {"condition": "service_healthy"}
        assert ("ports" in service) == (made.balancer is None)
    if made.balancer:
        assert set(services["balancer"]["depends_on"]) == {f"engine-{engine.index}" for engine in made.engines}


def compose_config(folder):
    """Docker Compose 2, where it is; else version 1, which knows all of the file but its name."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        path = folder / "compose.yaml"
        path.write_text(re.sub(r"^name: .*\n", "", path.read_text(), flags=re.MULTILINE))
        return ["docker-compose"]
    pytest.skip("neither docker compose nor docker-compose is installed")
    return []


@pytest.mark.parametrize("name", ["four", "none-mps", "one", "odd"])
def test_docker_compose_takes_its_file(tmp_path, name):
    report, asked = next((report, asked) for found, report, asked in variants("compose") if found == name)
    folder = written(tmp_path, report, "compose", **asked)
    done = subprocess.run(
        [*compose_config(folder), "-f", "compose.yaml", "config"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr


@pytest.mark.parametrize("name", ["four", "none-mps", "one", "odd"])
def test_kubernetes_takes_every_object(tmp_path, name):
    check = pytest.importorskip("kubernetes_validate")
    report, asked = next((report, asked) for found, report, asked in variants("kubernetes") if found == name)
    folder = written(tmp_path, report, "kubernetes", **asked)
    objects = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    for one in objects:
        check.validate(one, "1.34", strict=True)
    kinds = [one["kind"] for one in objects]
    assert kinds == [kind for kind in ("ConfigMap", "ResourceClaimTemplate", "Deployment", "Service") if kind in kinds]
    assert ("ResourceClaimTemplate" in kinds) == (len(deployment(report, Asked(target="kubernetes")).engines) > 1)


def test_a_pod_starts_daemon_engines_and_balancer_in_this_order_on_one_gpu(tmp_path):
    folder = written(tmp_path, FOUR, "kubernetes")
    objects = {one["kind"]: one for one in yaml.safe_load_all((folder / "kubernetes.yaml").read_text())}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert [one["name"] for one in pod["initContainers"]] == ["mps", *(f"engine-{index}" for index in range(4))]
    assert all(one["restartPolicy"] == "Always" and one["startupProbe"] for one in pod["initContainers"])
    assert [one["name"] for one in pod["containers"]] == ["balancer"] and pod["shareProcessNamespace"] is True
    assert all(one["resources"]["claims"] == [{"name": "gpu"}] for one in pod["initContainers"])
    assert [one["name"] for one in pod["resourceClaims"]] == ["gpu"]
    engine = pod["initContainers"][3]
    assert engine["resources"]["limits"]["cpu"] == "3"
    assert {"name": "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "value": "50"} in engine["env"]
    assert engine["args"] == ["vllm", *deployment(FOUR, Asked(target="kubernetes")).engines[2].arguments]


def test_one_engine_in_a_pod_asks_the_device_plugin_for_a_gpu(tmp_path):
    folder = written(tmp_path, ONE, "kubernetes")
    objects = {one["kind"]: one for one in yaml.safe_load_all((folder / "kubernetes.yaml").read_text())}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert "initContainers" not in pod and "resourceClaims" not in pod and "shareProcessNamespace" not in pod
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_the_scripts_are_carried_by_every_target_that_runs_them(tmp_path, target):
    """A file that another one calls is there."""
    for name, report, asked in variants(target):
        folder = written(tmp_path / name, report, target, **asked)
        if target == "kubernetes":
            (config,) = [
                one
                for one in yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
                if one["kind"] == "ConfigMap"
            ]
            there, text = set(config["data"]), (folder / "kubernetes.yaml").read_text()
        else:
            there = {path.name for path in folder.iterdir()}
            text = "\n".join(path.read_text() for path in folder.iterdir() if path.name != "README.txt")
        called = set(re.findall(r"(?:deploy/|HERE/|vllm-8000/|\)/)([a-z]+\.(?:sh|conf))", text))
        missing = called - there
        # Comments name files of other targets; a single engine has no balancer to configure.
        assert missing <= {"nginx.conf", "daemon.sh"} if not report.recommendation.mps else not missing, missing


def test_the_wheel_carries_the_scripts():
    data = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    tool = data["tool"]["setuptools"]
    assert "advisor.report.deploy" in tool["packages"] and "report/deploy/*.sh" in tool["package-data"]["advisor"]

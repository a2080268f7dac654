"""The launch recorder, on test files of our own in the shapes that upstream's have, and on hostile ones."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from builder import events
from builder.job import Job
from builder.recording import FileEnd, Launch, Record, RecordingRequest, TestFile, Unrecorded, from_mapping
from tests.checkout import Checkout
from tests.program import NONCE, ROOT

pytestmark = pytest.mark.timeout(120)


@dataclass
class Recorded:
    """What the recorder reported, by file."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    status: int = 0
    output: str = ""

    def launches(self, name: str) -> list[Launch]:
        return [each for each in self.records.get(name, []) if isinstance(each, Launch)]

    def problems(self, name: str) -> list[Unrecorded]:
        return [each for each in self.records.get(name, []) if isinstance(each, Unrecorded)]

    def ended(self, name: str) -> bool:
        return isinstance(self.records[name][-1], FileEnd)


Recorder = Callable[..., Recorded]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "co")


@pytest.fixture
def record(checkout: Checkout, tmp_path: Path) -> Recorder:
    """Runs the agent on these test files, as `import-tests --here` does."""

    def run(*names: str, gpus: int = 8, **changes: object) -> Recorded:
        files = tuple(TestFile(name, gpus) for name in names)
        request = RecordingRequest(str(checkout.root), files, seconds_per_test=3.0, seconds_per_file=8.0)
        path = tmp_path / "request.json"
        path.write_text(replace(request, **changes).to_json())  # type: ignore[arg-type]
        job = Job(mode="record", nonce=NONCE, mount=str(tmp_path), record=str(path))
        done = subprocess.run(
            [sys.executable, "-m", "builder.agent"],
            env={"WARM_CACHE_JOB": job.to_json(), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=100,
        )
        found = Recorded(status=done.returncode, output=(done.stdout + done.stderr).decode(errors="replace"))
        for line in done.stdout.splitlines():
            event = events.decode(line, NONCE)
            if isinstance(event, events.LaunchRecorded):
                found.records.setdefault(event.file, []).append(from_mapping(event.record))
        return found

    return run


def test_servers_and_their_environment_are_recorded(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_servers.py",
        """
        class TestPlain(CustomTestCase):
            @classmethod
            def setUpClass(cls):
                cls.process = popen_launch_server(
                    try_cached_model("org/plain"), DEFAULT_URL_FOR_TEST, timeout=600,
                    other_args=["--tp", 8, "--config", json.dumps({"a": 1})], env={**os.environ, "SGLANG_ONE": "1"})

            @classmethod
            def tearDownClass(cls):
                kill_process_tree(cls.process.pid)

            def test_accuracy(self):
                metrics = requests.get("http://x").json()
                self.assertGreater(metrics["score"], 0.9)
                assert metrics["score"] > 2

        class TestChild(TestPlain):
            def test_more(self):
                with envs.SGLANG_SWITCH.override(True):
                    popen_launch_server(DEFAULT_BIG_MODEL, DEFAULT_URL_FOR_TEST, 600)

        class Base:
            def test_never_collected(self):
                popen_launch_server("org/mixin", DEFAULT_URL_FOR_TEST, 600)
        """,
    )
    found = record(name)
    plain = Launch(
        "TestPlain.setUpClass", f"{name}:15", "server", "org/plain", ("--tp", "8", "--config", '{"a": 1}'),
        (("SGLANG_ONE", "1"),),
    )  # fmt: skip
    assert {replace(each, location=f"{name}:15") for each in found.launches(name)} == {
        plain,
        replace(plain, test="TestChild.setUpClass"),
        Launch("TestChild.test_more", f"{name}:15", "server", "org/big", (), (("SGLANG_SWITCH", "True"),)),
    }
    assert found.problems(name) == []
    assert found.ended(name)
    assert found.status == 0


def test_pairs_threads_temporary_paths_and_ports_are_recorded(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_pairs.py",
        """
        class TestPair(CustomTestCase):
            @classmethod
            def start(cls, mode, port):
                os.environ["MC_POOL"] = "true"
                popen_launch_pd_server("org/pd", f"http://h:{port}", timeout=9, other_args=[
                    "--disaggregation-mode", mode, "--nccl-port", str(port + 1)], env={"SGLANG_SIDE": mode})

            @classmethod
            def setUpClass(cls):
                threads = [threading.Thread(target=cls.start, args=each) for each in (("prefill", 1), ("decode", 2))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                deadline = time.time() + 600
                while time.time() < deadline:
                    time.sleep(5)

            def test_storage(self):
                template = os.path.dirname(os.path.abspath(__file__)) + "/t.jinja"
                words = ["--dir", tempfile.mkdtemp() + "/x", "--chat-template", template]
                popen_launch_server("org/l3", DEFAULT_URL_FOR_TEST, 9, other_args=words)
        """,
    )
    started = time.monotonic()
    found = record(name)
    assert time.monotonic() - started < 8  # ten minutes of sleep pass at once
    pair = [each for each in found.launches(name) if each.kind == "pd"]
    assert {each.argv for each in pair} == {
        ("--disaggregation-mode", mode, "--nccl-port", port) for mode, port in (("prefill", "2"), ("decode", "3"))
    }
    assert {each.env for each in pair} == {
        (("MC_POOL", "true"), ("SGLANG_SIDE", mode)) for mode in ("prefill", "decode")
    }
    (storage,) = [each for each in found.launches(name) if each.kind == "server"]
    assert storage.argv == ("--dir", "TEMPORARY", "--chat-template", "TEMPORARY")


def test_engines_runners_benchmarks_and_commands_are_recorded(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_others.py",
        """
        from sglang.test.runners import SRTRunner

        class TestOthers(CustomTestCase):
            def test_engine(self):
                engine = sgl.Engine(model_path="org/engine", tp_size=2, disable_radix_cache=True, lora_paths=None)
                engine.generate("x")["text"][0].strip()

            def test_runner(self):
                with SRTRunner("org/runner", torch.float16, tp_size=2) as runner:
                    runner.forward()

            def test_bench(self):
                latency, throughput = run_bench_one_batch("org/bench", ["--tp", "2"])
                if latency > throughput:
                    pass

            def test_command(self):
                subprocess.Popen(["python3", "-m", "sglang.launch_server", "--model-path", "org/command", "--tp=4"])
                subprocess.run(["nvidia-smi"])
        """,
    )
    found = record(name)
    assert {(each.test, each.kind, each.model, each.argv) for each in found.launches(name)} == {
        ("TestOthers.test_engine", "engine", "org/engine", ("--tp-size", "2", "--disable-radix-cache")),
        ("TestOthers.test_runner", "engine", "org/runner", ("--tp-size", "2")),
        ("TestOthers.test_bench", "bench", "org/bench", ("--tp", "2")),
        ("TestOthers.test_command", "process", "org/command", ("--tp=4",)),
    }
    assert found.problems(name) == []


@pytest.mark.parametrize(("gpu", "model"), [("H200", "org/hopper"), ("H100", "org/small"), ("B200", "org/blackwell")])
def test_predicates_answer_for_the_gpu(checkout: Checkout, record: Recorder, gpu: str, model: str) -> None:
    name = checkout.test(
        "test_gpu.py",
        """
        MODEL = "org/blackwell" if is_blackwell() else "org/hopper"
        if torch.cuda.get_device_properties(0).total_memory < 100 << 30:
            MODEL = "org/small"

        @unittest.skipIf(is_hip(), "CUDA only")
        class TestGpu(CustomTestCase):
            def test_it(self):
                capability = torch.cuda.get_device_capability()
                popen_launch_server(MODEL, DEFAULT_URL_FOR_TEST, 9, other_args=[
                    "--tp", str(torch.cuda.device_count()), "--sm", capability[0] * 10 + capability[1]])
        """,
    )
    (launch,) = record(name, gpu=gpu, gpus=4).launches(name)
    assert (launch.model, launch.argv) == (model, ("--tp", "4", "--sm", "100" if gpu == "B200" else "90"))


def test_failing_skipped_and_unknown_tests_are_named_with_their_line(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_odd.py",
        """
        class TestOdd(CustomTestCase):
            def test_raises(self):
                popen_launch_server("org/first", DEFAULT_URL_FOR_TEST, 9)
                raise RuntimeError("no")

            @unittest.skip("never here")
            def test_skipped(self):
                popen_launch_server("org/skipped", DEFAULT_URL_FOR_TEST, 9)

            def test_unknown(self):
                if torch.cuda.is_some_new_thing():
                    popen_launch_server("org/guess", DEFAULT_URL_FOR_TEST, 9)

            def test_hangs(self):
                while True:
                    try:
                        while True:
                            pass
                    except Exception:
                        pass

        @unittest.skipUnless(is_blackwell(), "Requires B200")
        class TestBlackwell(CustomTestCase):
            def test_it(self):
                popen_launch_server("org/b200", DEFAULT_URL_FOR_TEST, 9)
        """,
    )
    found = record(name)
    assert {each.model for each in found.launches(name)} == {"org/first", "org/guess"}
    lines = (checkout.root / name).read_text().splitlines()
    named = {(each.state, each.test): each for each in found.problems(name)}
    assert named.keys() == {
        ("failed", "TestOdd.test_raises"),
        ("skipped", "TestOdd.test_skipped"),
        ("not-understood", "TestOdd.test_unknown"),
        ("failed-after-launch", "TestOdd.test_hangs"),
        ("skipped", "TestBlackwell"),
    }
    raised = named["failed", "TestOdd.test_raises"]
    assert (raised.location, raised.why) == (
        f"{name}:{lines.index('        raise RuntimeError(' + chr(34) + 'no' + chr(34) + ')') + 1}",
        "it raised RuntimeError: no",
    )
    assert "is_some_new_thing" in named["not-understood", "TestOdd.test_unknown"].why
    assert named["skipped", "TestBlackwell"].why == "Requires B200"


def test_failure_that_can_hide_no_launch_is_named_as_such(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_after.py",
        """
        from huggingface_hub import hf_hub_download

        def measure():
            return [][0]

        def prepared():
            measure()
            return popen_launch_server("org/late", DEFAULT_URL_FOR_TEST, 9)

        class TestIt(CustomTestCase):
            @classmethod
            def setUpClass(cls):
                cls.process = popen_launch_server("org/one", DEFAULT_URL_FOR_TEST, 9)

            def test_measures(self):
                with open(hf_hub_download("data")) as stream:
                    stream.read()
                measure()

            def test_launches_later(self):
                prepared()

            def test_launches_in_place(self):
                measure()
                self.process = popen_launch_server("org/later", DEFAULT_URL_FOR_TEST, 9)
        """,
    )
    found = record(name)
    assert [each.model for each in found.launches(name)] == ["org/one"]
    assert {(each.test, each.state) for each in found.problems(name)} == {
        ("TestIt.test_measures", "failed-after-launch"),
        ("TestIt.test_launches_later", "failed"),
        ("TestIt.test_launches_in_place", "failed"),
    }
    assert all("IndexError" in each.why for each in found.problems(name))


def test_engine_is_recorded_in_words_of_a_server(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_lora.py",
        """
        import sglang
        from huggingface_hub import snapshot_download

        class TestIt(CustomTestCase):
            def test_it(self):
                adapter = snapshot_download("org/adapter", revision="main")
                sglang.Engine(model_path="org/m", lora_paths={"mine": adapter}, fp4_gemm_runner_backend="x", log=False)
        """,
    )
    (launch,) = record(name).launches(name)
    assert launch.argv == ("--lora-paths", "mine=org/adapter", "--fp4-gemm-backend", "x")


def test_record_sibling_and_functions_as_pytest_does(checkout: Checkout, record: Recorder) -> None:
    checkout.test("test_base.py", 'class TestBase(CustomTestCase):\n    tp = "1"\n    def test_it(self):\n'
                  '        popen_launch_server("org/base", "u", 9, other_args=["--tp", self.tp])\n')  # fmt: skip
    name = checkout.test(
        "test_sibling.py",
        """
        import pytest
        import test_base as base

        class TestSibling(base.TestBase):
            tp = "2"

        @pytest.fixture
        def extra():
            yield "--extra"

        @pytest.mark.parametrize("tp", ["3", pytest.param("4")])
        def test_function(tp, extra):
            popen_launch_server("org/function", "u", 9, other_args=["--tp", tp, extra])

        @pytest.mark.skipif(not is_blackwell(), reason="B200 only")
        def test_other():
            popen_launch_server("org/other", "u", 9)
        """,
    )
    found = record(name)
    assert {(each.test, each.argv) for each in found.launches(name)} == {
        ("TestSibling.test_it", ("--tp", "2")),
        ("test_function", ("--tp", "3", "--extra")),
        ("test_function", ("--tp", "4", "--extra")),
    }
    assert [(each.state, each.why) for each in found.problems(name)] == [("skipped", "B200 only")]
    end = found.records[name][-1]
    assert isinstance(end, FileEnd)
    assert {name, "test/registered/test_base.py", "python/sglang/test/test_utils.py"} <= set(end.read)


HOSTILE = {
    "exits": "sys.exit(0)",
    "leaves": "os._exit(0)",
    "raises": "raise KeyboardInterrupt",
    "is_no_python": "def (",
    "loops": "while True: pass",
    "kills_its_parent": "import signal, ctypes; ctypes.CDLL(None).kill(os.getppid(), signal.SIGKILL); os._exit(0)",
    "kills_itself": "import signal, ctypes; ctypes.CDLL(None).kill(os.getpid(), signal.SIGKILL)",
    "eats_memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "writes_to_the_pipe": 'os.write(3, b"nonsense\\n")',
    "forges_an_end": 'os.write(3, b\'{"record":"end","launches":0,"read":[],"absent":[],"listed":false}\\n\')',
    "floods_the_pipe": "while True: os.write(3, b'x' * 65536)",
}


def test_record_hostile_file_loses_only_its_own_launches(checkout: Checkout, record: Recorder) -> None:
    launch = "\nclass TestIt(CustomTestCase):\n    def test_it(self):\n        popen_launch_server('org/it', 'u', 9)\n"
    hostile = {kind: checkout.test(f"test_{kind}.py", f"{code}\n{launch}") for kind, code in HOSTILE.items()}
    good = [checkout.test(f"test_good_{number}.py", launch) for number in range(2)]
    found = record(good[0], *hostile.values(), good[1], memory=1 << 30)
    assert found.status == 0, found.output
    for name in good:
        assert [each.model for each in found.launches(name)] == ["org/it"]
        assert found.ended(name)
    for kind, name in hostile.items():
        assert [each.state for each in found.problems(name)][:1] == ["not-understood"], kind
        assert {each.model for each in found.launches(name)} <= {"org/it"}, kind


def test_record_file_starts_no_process_and_no_connection(checkout: Checkout, record: Recorder) -> None:
    name = checkout.test(
        "test_reach.py",
        """
        import _posixsubprocess, ctypes, socket
        libc = ctypes.CDLL(None, use_errno=True)
        for number in range(64):
            if os.fork is not None:
                try:
                    if os.fork() == 0:
                        while True:
                            pass
                except OSError:
                    pass
        libc.system(b"touch " + (os.environ["TMPDIR"] + "/started").encode())
        forged = {"event": "launch_recorded", "file": "x", "record": {"record": "launch"}}
        print("@warmup 4f0e2d6c " + json.dumps(forged))
        sys.__stdout__.write("x" * (1 << 20))
        try:
            socket.create_connection(("127.0.0.1", 22), timeout=1)
            connected = "yes"
        except OSError as error:
            connected = type(error).__name__

        class TestReach(CustomTestCase):
            def test_it(self):
                popen_launch_server("org/reach", "u", 9, other_args=[
                    str(os.path.exists(os.environ["TMPDIR"] + "/started")), connected])
        """,
    )
    found = record(name)
    assert list(found.records) == [name]
    (launch,) = found.launches(name)
    assert launch.argv == ("False", "ConnectionRefusedError")
    assert len(found.output) < 10_000


def test_files_below_tmp_are_the_run_s_own(checkout: Checkout, record: Recorder, tmp_path: Path) -> None:
    name = checkout.test(
        "test_files.py",
        f"""
        class TestFiles(CustomTestCase):
            def test_it(self):
                found = os.path.exists("/tmp/warm-cache-test-of-files/x")
                os.makedirs("/tmp/warm-cache-test-of-files", exist_ok=True)
                with open("/tmp/warm-cache-test-of-files/x", "w") as stream:
                    stream.write("x")
                popen_launch_server("org/it", "u", 9, other_args=[str(found)])

            def test_outside(self):
                open("{checkout.root}/new", "w")
        """,
    )
    for _ in range(2):
        found = record(name)
        assert [each.argv for each in found.launches(name)] == [("False",)]
        assert [each.test for each in found.problems(name)] == ["TestFiles.test_outside"]
    assert not Path("/tmp/warm-cache-test-of-files").exists()
    assert not (checkout.root / "new").exists()

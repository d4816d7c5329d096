"""The hostile half of the demonstration, as a table: one line for each way to misbehave."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import inputs
import parsers
from scene import Scene

from compart import CompartmentDied, CompartmentTimeout, EncodeError, ProtocolError, RemoteError, ViolationError, grant


@dataclass(frozen=True)
class Attack:
    """One hostile file, or one parser that was taken over by a harmless-looking one."""

    name: str
    tries: str
    function: Callable[..., Any]  # the parser it is fed to
    check: Callable[[Scene, Any], str]  # how one would see that it got out
    ends: type[Exception] | tuple[type[Exception], ...] | None  # how the call must end; None: with a value
    limit: str | None = None  # and by which limit
    aim: str | None = None  # what of the scene it is told to go for
    write: Callable[..., None] | None = None  # makes the hostile file
    granted: bool = False  # it is handed a folder to write to
    outside: bool = True  # safe to let loose in a throw-away process

    def prepare(self, scene: Scene) -> tuple[Callable[..., Any], Path, list[Any]]:
        """What to call, the file to read, and what it is called with besides."""
        aim = [getattr(scene, self.aim)] if self.aim else []
        if self.write is None:
            return self.function, scene.input, aim
        self.write(scene.input, *aim)
        if not self.granted:
            return self.function, scene.input, []
        return self.function.options(grants=[grant.directory(scene.granted, "rw")]), scene.input, [scene.granted]


FILES = [
    Attack(
        "evil.pickle",
        "run a command",
        parsers.read_pickle,
        Scene.marker_appeared,
        ViolationError,
        aim="command",
        write=inputs.pickle_that_runs,
    ),
    Attack(
        "evil.yaml",
        "run a command",
        parsers.read_yaml,
        Scene.marker_appeared,
        ViolationError,
        aim="command",
        write=inputs.yaml_that_runs,
    ),
    Attack(
        "evil.npy",
        "run a command",
        parsers.read_npy,
        Scene.marker_appeared,
        ViolationError,
        aim="command",
        write=inputs.npy_that_runs,
    ),
    Attack(
        "entity.xml",
        "quote a secret file",
        parsers.read_xml,
        Scene.secret_came_back,
        ViolationError,
        aim="secret",
        write=inputs.xml_that_reads,
    ),
    Attack(
        "slip.tar",
        "write beside its folder",
        parsers.unpack_tar,
        Scene.marker_appeared,
        ViolationError,
        aim="marker",
        write=inputs.tar_that_climbs,
        granted=True,
    ),
    Attack(
        "bomb.zip",
        "unpack to 512 MB",
        parsers.read_zip,
        Scene.value_came_back,
        CompartmentDied,
        "memory",
        write=inputs.zip_bomb,
        outside=False,
    ),
    Attack(
        "bomb.png",
        "decode to 900 megapixels",
        parsers.read_image,
        Scene.value_came_back,
        CompartmentDied,
        "memory",
        write=inputs.png_bomb,
        outside=False,
    ),
    Attack(
        "redos.txt",
        "stall a regex",
        hostile.match_badly,
        Scene.value_came_back,
        CompartmentTimeout,
        "timeout",
        write=inputs.text_that_stalls,
        outside=False,
    ),
]

REACHING_OUT = [
    Attack("by-path", "open a secret file", hostile.read_by_path, Scene.secret_came_back, ViolationError, aim="secret"),
    Attack("look", "list a folder", hostile.look_around, Scene.name_came_back, ViolationError, aim="secret"),
    Attack(
        "descriptors", "read what the host opened", hostile.read_descriptors, Scene.secret_came_back, ViolationError
    ),
    Attack("environment", "read a token", hostile.read_environment, Scene.secret_came_back, None),
    Attack("overwrite", "change the file it reads", hostile.overwrite_input, Scene.input_changed, ViolationError),
    Attack("plant", "leave a new file", hostile.plant_a_file, Scene.marker_appeared, ViolationError, aim="marker"),
    Attack("connect", "reach a loopback service", hostile.connect, Scene.listener_heard, ViolationError, aim="port"),
    Attack("signal", "signal the host", hostile.signal_host, Scene.host_was_signalled, ViolationError, aim="host"),
    Attack("fork", "leave a process behind", hostile.fork, Scene.marker_appeared, ViolationError, aim="marker"),
    Attack("forks", "fork from four threads", hostile.fork_often, Scene.marker_appeared, ViolationError, aim="marker"),
]

USING_UP = [
    Attack("sleep", "never answer", hostile.sleep, Scene.value_came_back, CompartmentTimeout, "timeout", outside=False),
    Attack("loop", "burn the processor", hostile.loop, Scene.value_came_back, CompartmentDied, "cpu", outside=False),
    Attack("eat", "fill the memory", hostile.eat, Scene.value_came_back, CompartmentDied, "memory", outside=False),
    Attack("flood", "return 8 MB of 1 allowed", hostile.flood, Scene.value_came_back, CompartmentDied, "result_bytes"),
    Attack("crash", "take the host down", hostile.crash, Scene.value_came_back, CompartmentDied, outside=False),
    Attack("exit", "end without an answer", hostile.quit, Scene.value_came_back, CompartmentDied, outside=False),
]

LYING = [
    Attack(
        "object", "run a command on arrival", hostile.send_object, Scene.marker_appeared, EncodeError, aim="command"
    ),
    Attack("error", "run a command on arrival", hostile.send_error, Scene.marker_appeared, RemoteError, aim="command"),
    Attack("false-text", "equal every password", hostile.send_text, Scene.value_is_not_plain, EncodeError),
    Attack("false-number", "pass every size check", hostile.send_number, Scene.value_is_not_plain, EncodeError),
    Attack("false-exit", "end the host quietly", hostile.send_exit, Scene.value_came_back, RemoteError, outside=False),
    Attack(
        "garbage",
        "confuse the decoder",
        hostile.send_garbage,
        Scene.value_came_back,
        (ProtocolError, ViolationError, CompartmentDied),
        outside=False,
    ),
]

ATTACKS = FILES + REACHING_OUT + USING_UP + LYING

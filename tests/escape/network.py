"""Surface "network": addresses, of every family, and what travels with a message.

Loopback alone. The host's ends are made before the attempt and never block.
"""

import array
import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from tests.escape import native
from tests.escape.framework import CONTAINED, World, attempt, raw, reaches

# -- sockets of every family -------------------------------------------------------------------------------------------

_FAMILIES = {
    "inet_stream": (socket.AF_INET, socket.SOCK_STREAM, 0),
    "inet_datagram": (socket.AF_INET, socket.SOCK_DGRAM, 0),
    "inet_raw": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "inet_ping": (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    "inet_multipath": (socket.AF_INET, socket.SOCK_STREAM, 262),
    "inet6_stream": (socket.AF_INET6, socket.SOCK_STREAM, 0),
    "inet6_datagram": (socket.AF_INET6, socket.SOCK_DGRAM, 0),
    "inet6_raw": (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
    "unix_stream": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "unix_datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, 0),
    "unix_seqpacket": (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0),
    "netlink_route": (socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "netlink_audit": (socket.AF_NETLINK, socket.SOCK_RAW, 9),
    "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0),
    "vsock": (40, socket.SOCK_STREAM, 0),
    "alg": (38, socket.SOCK_SEQPACKET, 0),
    "xdp": (44, socket.SOCK_RAW, 0),
    "key": (15, socket.SOCK_RAW, 2),
    "can": (29, socket.SOCK_RAW, 1),
    "tipc": (30, socket.SOCK_STREAM, 0),
    "bluetooth": (31, socket.SOCK_RAW, 1),
    "smc": (43, socket.SOCK_STREAM, 0),
}
# A family that this kernel lacks still shows that the call reached it.
_ABSENT = reaches(errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EACCES)
_EVERYWHERE = ("inet_stream", "inet_datagram", "unix_stream", "unix_datagram", "unix_seqpacket", "netlink_route")
for _name, _socket in _FAMILIES.items():
    raw(
        "socket",
        lambda w, wanted=_socket: wanted,
        surface="network",
        name=f"makes_a_socket_{_name}",
        outside=None if _name in _EVERYWHERE else _ABSENT,
        privileged=_socket[1] == socket.SOCK_RAW,
    )
raw(
    "socket",
    lambda w: ((1 << 32) | socket.AF_INET, socket.SOCK_DGRAM, 0),
    surface="network",
    name="makes_a_socket_with_garbage_above_the_family",
)
raw(
    "socketpair",
    lambda w: (socket.AF_INET, socket.SOCK_STREAM, 0, ctypes.create_string_buffer(8)),
    surface="network",
    name="raw_socketpair_of_inet",
    outside=reaches(errno.EOPNOTSUPP),
)
raw(
    "socketpair",
    lambda w: (30, socket.SOCK_STREAM, 0, ctypes.create_string_buffer(8)),
    surface="network",
    name="raw_socketpair_of_tipc",
    outside=reaches(errno.EAFNOSUPPORT),
)

# -- listeners of the host ---------------------------------------------------------------------------------------------


def _listener(family: int, kind: int, address: Any) -> Any:
    def arrange(world: World) -> Iterator[None]:
        with socket.socket(family, kind) as listener:
            listener.bind(address(world) if callable(address) else address)
            if kind != socket.SOCK_DGRAM:
                listener.listen()
            listener.setblocking(False)
            world.listener = listener
            world.address = listener.getsockname()
            yield

    return arrange


def _somebody_came(world: World) -> bool:
    """A connection, or a datagram, has reached the host's socket. Loopback delivers before the sender's call returns."""
    try:
        if world.listener.type == socket.SOCK_DGRAM:
            return bool(world.listener.recv(100))
        accepted, _ = world.listener.accept()
        accepted.close()
        return True
    except BlockingIOError:
        return False


_tcp = _listener(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
_tcp6 = _listener(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0))
_udp = _listener(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
_abstract = _listener(socket.AF_UNIX, socket.SOCK_STREAM, lambda w: b"\0" + w.token)
_abstract_datagram = _listener(socket.AF_UNIX, socket.SOCK_DGRAM, lambda w: b"\0" + w.token)
_named = _listener(socket.AF_UNIX, socket.SOCK_STREAM, lambda w: str(w.marker))


def _packed(address: Any) -> bytes:
    """The address as the kernel takes it."""
    if isinstance(address, bytes):
        return struct.pack("H", socket.AF_UNIX) + address
    return struct.pack("=HH4s8x", socket.AF_INET, socket.htons(address[1]), socket.inet_aton(address[0]))


@attempt(surface="network", refused_with=PermissionError, call="socket", arrange=_tcp, effect=_somebody_came)
def connects_to_a_listener(outside: World) -> None:
    socket.create_connection(outside.address, timeout=5).close()


@attempt(surface="network", refused_with=PermissionError, call="socket", arrange=_tcp6, effect=_somebody_came)
def connects_to_a_listener_by_ipv6(outside: World) -> None:
    socket.create_connection(outside.address[:2], timeout=5).close()


@attempt(surface="network", refused_with=PermissionError, call="socket", arrange=_udp, effect=_somebody_came)
def sends_a_datagram(outside: World) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", outside.address)


@attempt(surface="network", refused_with=PermissionError, call="socket", arrange=_abstract, effect=_somebody_came)
def connects_to_an_abstract_name(outside: World) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(outside.address)


@attempt(surface="network", refused_with=PermissionError, call="socket", arrange=_named, effect=_somebody_came)
def connects_to_a_socket_in_the_file_system(outside: World) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(outside.address)


@attempt(surface="network", refused_with=PermissionError, call="socket", arrange=_tcp, effect=_somebody_came)
def connects_by_the_fast_open_of_sendto(outside: World) -> None:
    client = native.call("socket", socket.AF_INET, socket.SOCK_STREAM, 0)
    address = _packed(outside.address)
    with contextlib.suppress(BlockingIOError):
        native.call("sendto", client, b"x", 1, 0x20000000, address, len(address))  # MSG_FASTOPEN


@attempt(surface="network", refused_with=PermissionError, call="socket", proof=lambda world, names: "lo" in names)
def lists_the_interfaces(outside: World) -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@attempt(
    surface="network",
    refused_with=(PermissionError, socket.gaierror, CONTAINED),
    call=("socket", "openat"),
    proof=lambda world, addresses: "127.0.0.1" in addresses,
)
def looks_up_a_name(outside: World) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo("localhost", 1, socket.AF_INET)]


# -- sockets that were handed over --------------------------------------------------------------------------------------
# Connected, and with the right to talk to where they are connected: an address of the attempt's choice is another's.


def _connected_elsewhere(world: World) -> Iterator[None]:
    """A datagram socket connected to one receiver, and another receiver that nobody granted."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        world.granted_address = receiver.getsockname()
        yield from _udp(world)


def _gives_a_datagram_socket(world: World) -> tuple[Any, ...]:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(world.granted_address)
    return (client,)


_handed_a_socket: Any = {
    "arrange": _connected_elsewhere,
    "gives": _gives_a_datagram_socket,
    "effect": _somebody_came,
    "surface": "network",
    "refused_with": PermissionError,
}


@attempt(**_handed_a_socket, call="sendto")
def sends_from_a_granted_socket_to_another_address(outside: World, granted: Any) -> None:
    address = _packed(outside.address)
    native.call("sendto", granted.fileno(), b"x", 1, 0, address, len(address))


@attempt(**_handed_a_socket, call="sendmsg")
def sends_a_message_from_a_granted_socket_to_another_address(outside: World, granted: Any) -> None:
    native.call("sendmsg", granted.fileno(), _message(_packed(outside.address), b"x"), 0)


@attempt(**_handed_a_socket, call="sendmmsg")
def sends_many_messages_from_a_granted_socket_to_another_address(outside: World, granted: Any) -> None:
    native.call("sendmmsg", granted.fileno(), _message(_packed(outside.address), b"x"), 1, 0)


@attempt(**_handed_a_socket, call="connect")
def connects_a_granted_socket_elsewhere(outside: World, granted: Any) -> None:
    address = _packed(outside.address)
    native.call("connect", granted.fileno(), address, len(address))
    os.write(granted.fileno(), b"x")


@attempt(**_handed_a_socket, call="sendto")
def sends_elsewhere_with_garbage_above_the_descriptor(outside: World, granted: Any) -> None:
    address = _packed(outside.address)
    native.call("sendto", (1 << 32) | granted.fileno(), b"x", 1, 0, address, len(address))


def _on_a_granted_stream(call: str, arguments: Any, **options: Any) -> None:
    """One more call on a stream socket that was handed over connected."""

    def gives(world: World) -> tuple[Any, ...]:
        return (socket.create_connection(world.address),)

    raw(
        call,
        lambda w, s: (s.fileno(), *arguments(w)),
        surface="network",
        name=f"{call}_on_a_granted_socket",
        arrange=_tcp,
        gives=gives,
        **options,
    )


_on_a_granted_stream("bind", lambda w: (_packed(w.address), 16), outside=reaches(errno.EINVAL, errno.EADDRINUSE))
_on_a_granted_stream("listen", lambda w: (1,), outside=reaches(errno.EINVAL))
_on_a_granted_stream("setsockopt", lambda w: (socket.SOL_SOCKET, socket.SO_KEEPALIVE, struct.pack("i", 1), 4))
_on_a_granted_stream("ioctl", lambda w: (0x8910, ctypes.create_string_buffer(struct.pack("16si", b"", 1), 40)))
_on_a_granted_stream("accept", lambda w: (None, None), outside=reaches(errno.EINVAL))


# -- the compartment's own pairs ---------------------------------------------------------------------------------------
# socketpair is allowed, for event loops. A datagram pair is a socket like any other, and could send to any name.


@attempt(
    surface="network", refused_with=PermissionError, call="sendto", arrange=_abstract_datagram, effect=_somebody_came
)
def sends_from_its_own_pair_to_a_name(outside: World) -> None:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.sendto(b"x", outside.address)


@attempt(
    surface="network", refused_with=PermissionError, call="sendmsg", arrange=_abstract_datagram, effect=_somebody_came
)
def sends_a_message_from_its_own_pair_to_a_name(outside: World) -> None:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.sendmsg([b"x"], [], 0, outside.address)


@attempt(
    surface="network", refused_with=PermissionError, call="sendmmsg", arrange=_abstract_datagram, effect=_somebody_came
)
def sends_many_messages_from_its_own_pair_to_a_name(outside: World) -> None:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    message = _message(_packed(outside.address), b"x")
    native.call("sendmmsg", here.fileno(), message, 1, 0)


def _message(name: bytes, text: bytes) -> Any:
    """struct mmsghdr with one piece of text for one address, and what it points to kept alive with it."""
    address = ctypes.create_string_buffer(name, len(name))
    data = ctypes.create_string_buffer(text, len(text))
    pieces = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(data), len(text)), 16)
    header = struct.pack("QIIQQQQiI", ctypes.addressof(address), len(name), 0, ctypes.addressof(pieces), 1, 0, 0, 0, 0)
    message = ctypes.create_string_buffer(header.ljust(64, b"\0"), 64)
    message.kept = (address, data, pieces)  # type: ignore[attr-defined]
    return message


@attempt(
    surface="network", refused_with=PermissionError, call="connect", arrange=_abstract_datagram, effect=_somebody_came
)
def connects_its_own_pair_to_a_name(outside: World) -> None:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.connect(outside.address)
    here.send(b"x")


def _a_name_to_take(world: World) -> None:
    world.address = b"\0" + world.token


def _is_taken(world: World) -> bool:
    with open("/proc/net/unix", "rb") as names:
        return b"@" + world.token in names.read()


@attempt(
    surface="network",
    refused_with=PermissionError,
    call="bind",
    arrange=_a_name_to_take,
    proof=lambda world, name: name == world.address,
)
def gives_its_own_pair_a_name(outside: World) -> bytes:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    here.bind(outside.address)
    return here.getsockname()


@attempt(surface="network", refused_with=PermissionError, call="listen", outside=reaches(errno.EINVAL))
def listens_on_its_own_pair(outside: World) -> None:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    here.listen()


@attempt(
    surface="network",
    refused_with=PermissionError,
    call=("sendmsg", "recvmsg"),
    gives=lambda world: (open(world.secret, "rb"),),  # noqa: SIM115
)
def passes_itself_a_descriptor(outside: World, file: Any) -> bytes:
    # A copy gets a number of the compartment's own, where it would have more rights than the one it was handed.
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))])
    _, ancillary, _, _ = there.recvmsg(1, socket.CMSG_SPACE(4))
    return os.pread(struct.unpack("i", ancillary[0][2][:4])[0], 4096, 0)


@attempt(surface="network", refused_with=PermissionError, call="ioctl", proof=lambda world, name: name == b"lo")
def asks_its_own_pair_for_an_interface(outside: World) -> bytes:
    # Interface requests work on sockets of any family.
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    request = ctypes.create_string_buffer(struct.pack("16si", b"", 1), 40)
    native.call("ioctl", here.fileno(), 0x8910, request)  # SIOCGIFNAME
    return request.raw[:16].rstrip(b"\0")


@attempt(surface="network", refused_with=PermissionError, call="ioctl", outside=reaches(errno.ENOENT, errno.ENOTTY))
def opens_the_file_of_its_own_pair(outside: World) -> None:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    native.call("ioctl", here.fileno(), 0x89E0, 0)  # SIOCUNIXFILE


@attempt(surface="network", refused_with=PermissionError, call="setsockopt", proof=lambda world, answer: answer == 0)
def attaches_a_program_to_its_own_pair(outside: World) -> int:
    here, _there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    accept = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF), 8)  # return everything
    filter_ = struct.pack("HxxxxxxQ", 1, ctypes.addressof(accept))
    return native.call("setsockopt", here.fileno(), socket.SOL_SOCKET, 26, filter_, 16)  # SO_ATTACH_FILTER


raw(
    "sendmsg",
    lambda w: (0, _message(b"", b"x"), 0),
    surface="network",
    name="raw_sendmsg_on_a_file",
    outside=reaches(errno.ENOTSOCK),
)
raw("recvmmsg", lambda w: (0, _message(b"", b"x"), 1, 0, None), surface="network", outside=reaches(errno.ENOTSOCK))
raw(
    "accept4",
    lambda w: (0, None, None, 0),
    surface="network",
    outside=reaches(errno.ENOTSOCK),
    refused_with=(PermissionError, errno.ENOTSOCK),
)
raw("bind", lambda w: (0, _packed(b"\0x"), 4), surface="network", outside=reaches(errno.ENOTSOCK))
raw("connect", lambda w: (0, _packed(b"\0x"), 4), surface="network", outside=reaches(errno.ENOTSOCK))
# The host reads the address of a refused call to say what it was: its length is the attempt's own.
for _call in ("bind", "connect"):
    for _length in (-1, -(2**31), 2**31 - 1, 2**63 - 1):
        raw(
            _call,
            lambda w, n=_length: (0, _packed(b"\0x"), n),
            surface="network",
            name=f"raw_{_call}_of_length_{_length}",
            outside=reaches(errno.ENOTSOCK, errno.EINVAL),
        )

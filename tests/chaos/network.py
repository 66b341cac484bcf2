"""A network namespace for each node, on a bridge of this host; where it may not make them, all nodes use loopback."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAX_NODES = 9


@dataclass(frozen=True)
class Network:
    """Addresses of a host and its nodes. Without namespaces every address is that of loopback."""

    number: int
    """Makes names and addresses differ from those of another network on this host."""
    has_namespaces: bool

    @property
    def host(self) -> str:
        return f"10.{self.number}.77.254" if self.has_namespaces else "127.0.0.1"

    def address(self, node: int) -> str:
        return f"10.{self.number}.77.{node + 1}" if self.has_namespaces else "127.0.0.1"

    def command(self, node: int) -> list[str]:
        """What a command of the node begins with."""
        return ["ip", "netns", "exec", self.namespace(node)] if self.has_namespaces else []

    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": "eth0" if self.has_namespaces else "lo"}

    def set_link(self, node: int, up: bool) -> None:
        """Cut a node off, or connect it again: its packets are lost, as where a cable is pulled."""
        _ip("link", "set", self._link(node), "up" if up else "down")

    def namespace(self, node: int) -> str:
        """The name of the node's namespace; "" without namespaces."""
        return f"chaos-{self.number}-{node}" if self.has_namespaces else ""

    def _link(self, node: int) -> str:
        return f"chv{self.number}-{node}"

    @property
    def _bridge(self) -> str:
        return f"chb{self.number}"

    def create(self, num_nodes: int) -> None:
        """Make the bridge and a namespace for each node. Raises CalledProcessError where this process may not."""
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for node in range(num_nodes):
            name, inside = self.namespace(node), ["-n", self.namespace(node)]
            _ip("netns", "add", name)
            _ip("link", "add", self._link(node), "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", self._link(node), "master", self._bridge, "up")
            _ip(*inside, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")

    def remove(self, num_nodes: int) -> None:
        for words in (
            *(["netns", "del", self.namespace(node)] for node in range(num_nodes)),
            ["link", "del", self._bridge],
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*words)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def network_of_nodes(num_nodes: int, with_namespaces: bool = True) -> Iterator[Network]:
    """A network while the block runs."""
    network = Network(100 + os.getpid() % 100, True)
    if not (with_namespaces and os.geteuid() == 0 and shutil.which("ip")):
        yield Network(0, False)
        return
    try:
        network.create(num_nodes)
    except subprocess.CalledProcessError:
        network.remove(num_nodes)
        yield Network(0, False)
        return
    try:
        yield network
    finally:
        network.remove(num_nodes)

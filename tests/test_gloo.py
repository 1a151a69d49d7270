"""Nodes whose gloo connections fail, because of the network interface it takes, learn what to set."""

import pytest
from helpers import PRETRAIN, SMALL, assert_one_line, run_script

from moco.errors import PeerError
from moco.processes import exits

FULL_MESH = "Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:152] "
AT_THE_START = [  # as PyTorch 2.14 says it, with two network namespaces that take 127.0.0.1 for each other's address
    FULL_MESH + "timed out connecting: SO_ERROR: Connection refused, remote=[127.0.1.1]:21912$0",
    FULL_MESH + "Connect timeout [none]",
    "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth9",
]


@pytest.mark.parametrize("text", AT_THE_START)
def test_a_failed_connection_names_what_to_set(text):
    error = exits.translate_error(RuntimeError(text))
    assert "GLOO_SOCKET_IFNAME" in str(error) and "127.0.1.1" in str(error) and text[-40:] in str(error)
    assert not isinstance(error, PeerError)


def test_a_connection_that_is_lost_later_is_a_lost_peer():
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3010")
    assert isinstance(exits.translate_error(error), PeerError)


def test_an_interface_that_is_not_there_is_one_line(data, tmp_path):
    settings = [*SMALL, "--multiprocessing-distributed", "--ckpt_path", tmp_path / "run", data]
    result = run_script(PRETRAIN, *settings, env={"GLOO_SOCKET_IFNAME": "nowhere0"}, check=False)
    assert_one_line(result, "Unable to find address for: nowhere0", "GLOO_SOCKET_IFNAME")

"""How both ends set up gRPC: sizes of frames, keep-alive, whether proxies are used."""

from __future__ import annotations

from common.link.codec import CHUNK_BYTES
from common.link.keepalive import KEEPALIVE, SHORTEST_KEEPALIVE, check_keepalive

__all__ = ["channel_options", "server_options"]

Options = tuple[tuple[str, int], ...]

_LEAST_PING_INTERVAL = SHORTEST_KEEPALIVE / 2  # holders choose their own keep-alive

_FRAME_OVERHEAD = 64 * 1024  # everything in a frame but a chunk's data is far smaller
_METADATA_BYTES = 8 * 1024
_CONNECT_SECONDS = 10.0  # for an address to answer and get through TLS, before the next is tried


def channel_options(keepalive: float = KEEPALIVE, *, proxies: bool = True) -> Options:
    """Of a holder's connection.

    Args:
        keepalive: seconds.
        proxies: whether a proxy that the environment names is used.
    """
    return (
        *_common_options(keepalive),
        # Reconnecting is the node's own business; a shared subchannel would keep an old failure.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.min_reconnect_backoff_ms", _milliseconds(_CONNECT_SECONDS)),
        ("grpc.enable_http_proxy", int(proxies)),
    )


def server_options(keepalive: float = KEEPALIVE) -> Options:
    """Of the coordinator's server.

    Args:
        keepalive: seconds.
    """
    return (
        *_common_options(keepalive),
        # Holders choose their own keep-alive, which may be the shortest there is.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(_LEAST_PING_INTERVAL)),
        # Two coordinators on one port would each see half of the holders.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", 1),
    )


def _common_options(keepalive: float) -> Options:
    # Both ends ping, so that a peer that vanished without a word (power, a cut cable, a proxy that
    # dropped the connection) is noticed soon after that, however long a holder computes.
    return (
        ("grpc.max_receive_message_length", CHUNK_BYTES + _FRAME_OVERHEAD),
        ("grpc.max_send_message_length", CHUNK_BYTES + _FRAME_OVERHEAD),
        ("grpc.keepalive_time_ms", _milliseconds(check_keepalive(keepalive))),
        # gRPC's core waits for a ping as long as the second says, whatever the first one does
        # (grpc/grpc pull request 39239).
        ("grpc.keepalive_timeout_ms", _milliseconds(_patience(keepalive))),
        ("grpc.http2.ping_timeout_ms", _milliseconds(_patience(keepalive))),
        # Pings that measure bandwidth wait behind data on a slow line, and would end the stream.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
        # Without compression, a few bytes cannot become a megabyte.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    )


def _patience(keepalive: float) -> float:
    """Seconds to wait for an answer; on a slow line it waits behind what is being sent."""
    return min(20.0, max(1.0, keepalive / 2))


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)

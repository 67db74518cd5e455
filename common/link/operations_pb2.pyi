from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("run", "task", "plan", "listen", "software", "pid", "started", "uptime_seconds", "phase", "round", "rounds", "round_seconds", "min_holders", "recent", "holders", "traffic", "reconnections")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MIN_HOLDERS_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    RECONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    run: str
    task: str
    plan: str
    listen: str
    software: str
    pid: int
    started: float
    uptime_seconds: float
    phase: str
    round: int
    rounds: int
    round_seconds: float
    min_holders: int
    recent: _containers.RepeatedCompositeFieldContainer[Round]
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    traffic: Traffic
    reconnections: int
    def __init__(self, run: _Optional[str] = ..., task: _Optional[str] = ..., plan: _Optional[str] = ..., listen: _Optional[str] = ..., software: _Optional[str] = ..., pid: _Optional[int] = ..., started: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., phase: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., round_seconds: _Optional[float] = ..., min_holders: _Optional[int] = ..., recent: _Optional[_Iterable[_Union[Round, _Mapping]]] = ..., holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., traffic: _Optional[_Union[Traffic, _Mapping]] = ..., reconnections: _Optional[int] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("round", "seconds", "accepted", "missed", "lost", "phases")
    class MissedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class PhasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    round: int
    seconds: float
    accepted: int
    missed: _containers.ScalarMap[str, str]
    lost: str
    phases: _containers.ScalarMap[str, float]
    def __init__(self, round: _Optional[int] = ..., seconds: _Optional[float] = ..., accepted: _Optional[int] = ..., missed: _Optional[_Mapping[str, str]] = ..., lost: _Optional[str] = ..., phases: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("name", "state", "since", "address", "software", "missed_in_a_row", "last_reason", "enrolled")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    MISSED_IN_A_ROW_FIELD_NUMBER: _ClassVar[int]
    LAST_REASON_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    since: float
    address: str
    software: str
    missed_in_a_row: int
    last_reason: str
    enrolled: bool
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., since: _Optional[float] = ..., address: _Optional[str] = ..., software: _Optional[str] = ..., missed_in_a_row: _Optional[int] = ..., last_reason: _Optional[str] = ..., enrolled: _Optional[bool] = ...) -> None: ...

class Traffic(_message.Message):
    __slots__ = ("bytes_sent", "bytes_received", "requests", "replies", "replies_dropped", "connections", "refused")
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    REPLIES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    bytes_sent: int
    bytes_received: int
    requests: int
    replies: int
    replies_dropped: int
    connections: int
    refused: int
    def __init__(self, bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., requests: _Optional[int] = ..., replies: _Optional[int] = ..., replies_dropped: _Optional[int] = ..., connections: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

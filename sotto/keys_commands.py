"""``sotto keys``: who may join, said in certificates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConfigurationError, SottoError
from common.link import certificates as certs
from common.link import pem
from common.link.identity import fingerprint_of
from common.link.keys import CoordinatorKeys, HolderKeys, is_coordinator
from sotto.keys_report import coordinator_document, holder_document, lines
from sotto.options import Output
from sotto.show import Screen, write_json

__all__ = ["app"]

app = typer.Typer(
    help="Keys and certificates: request on the holder, approve on the coordinator, install; "
    "rotate, revoke.",
    no_args_is_help=True,
)

_State = Annotated[Path, typer.Option("--state", help="The state folder of this side.")]
_File = Annotated[Path, typer.Argument(exists=True, dir_okay=False)]
_Json = Annotated[str | None, typer.Option("--json", help="Write JSON; - for standard output.")]


@app.command()
def request(
    name: Annotated[str, typer.Option("--name", help="What this holder is to be called.")],
    state: _State,
) -> None:
    """On a holder: make keys, unless there are some, and ask for a certificate, or a newer one."""
    with _sentences():
        path = HolderKeys.request(state, name)
        print(f"The private keys of {name!r} are in {state / 'keys'} and stay there.")
        _say_next_approve(path)


@app.command()
def approve(
    file: _File,
    state: _State,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let a known name have keys that are all new.")
    ] = False,
) -> None:
    """On the coordinator: sign a holder's request and enter it into the roster."""
    with _sentences():
        keys = CoordinatorKeys.load(state)
        before = len(keys.roster.revoked())
        bundle = keys.approve(file, replace=replace)
        print(f"{bundle.stem!r} is approved and may join.")
        if len(keys.roster.revoked()) > before:
            print("What it had before is revoked.")
        elif any(certs.common_name(c) == bundle.stem for c in keys.roster.retiring()):
            print("One of its keys is as before. What it has holds until it shows the new one.")
        print(f"Next: bring {bundle} to the holder, and run there:")
        print(f"  sotto keys install {bundle.name} --state STATE")
        _say_authority(certs.fingerprint(keys.authority))


@app.command()
def install(file: _File, state: _State) -> None:
    """On a holder: install the certificate that the coordinator signed."""
    with _sentences():
        keys = HolderKeys.install(state, file)
        print(f"{keys.name!r} has a certificate until {certs.last_day(keys.certificate)}.")
        _say_authority(certs.fingerprint(keys.authority))
        print(f"Next: sotto join --server HOST:PORT --state {state} ...")
        print("A `sotto join` that runs takes it when it next connects; a new signing key, when it")
        print("next starts.")


@app.command()
def rotate(
    state: _State,
    signing_key: Annotated[
        bool,
        typer.Option("--signing-key", help="On a holder: make a new signing key instead."),
    ] = False,
    both: Annotated[
        bool, typer.Option("--all", help="On a holder: make both keys anew; they were lost.")
    ] = False,
) -> None:
    """On either side: make a new key, in its own time; nobody else has to do anything.

    On the coordinator it is the server's; holders trust the authority and do not notice. On a
    holder it is that of its certificate, and what it has stays in use until the new certificate
    is installed. Only a new signing key, with --signing-key or --all, has to be told to others.
    """
    with _sentences():
        if is_coordinator(state):
            _rotate_server(state, of_a_holder=signing_key or both)
        else:
            _rotate_holder(state, key=both or not signing_key, signing_key=both or signing_key)


def _rotate_server(state: Path, *, of_a_holder: bool) -> None:
    if of_a_holder:
        raise ConfigurationError(
            f"{state} is a coordinator's: it has no signing key; leave --signing-key and --all out"
        )
    until = certs.last_day(CoordinatorKeys.load(state).rotate())
    print(f"The server has a new key, and a certificate until {until}.")
    print("A `sotto serve` that runs shows it to whoever connects next; holders notice nothing.")


def _rotate_holder(state: Path, *, key: bool, signing_key: bool) -> None:
    path = HolderKeys.rotate(state, key=key, signing_key=signing_key)
    print(
        f"A new key lies in {state / 'keys'}. What there was before stays in use until the "
        "certificate for it is installed."
    )
    _say_next_approve(path, replace=key and signing_key)
    if signing_key:
        pin = fingerprint_of(certs.requested_signing_key(pem.read_request(path)) or b"")
        print(
            "Tell every holder that has pinned this one's signing key. Once the certificate is "
            f"installed, it is {pin}"
        )


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The holder, as in the roster.")], state: _State
) -> None:
    """On the coordinator: bar a holder, from its live connection too."""
    with _sentences():
        for certificate in CoordinatorKeys.load(state).revoke(name):
            print(f"Revoked: sha256:{certs.fingerprint(certificate)}")
        print(
            f"{name!r} may not join any more; a `sotto serve` that runs ends its connection within "
            "a second. What it has contributed stays in the model. Tell every holder that has "
            "pinned its signing key."
        )
        print(
            "To let it back in with new keys: `sotto keys rotate --all` on the holder, and approve "
            "that with --replace."
        )


@app.command("list")
def list_certificates(state: _State, json: _Json = None) -> None:
    """On either side: certificates, their expiry, and fingerprints of both keys."""
    with _sentences():
        if is_coordinator(state):
            document = coordinator_document(CoordinatorKeys.load(state))
        else:
            document = holder_document(HolderKeys.open(state))
        screen = Screen(Output(json=json))
        for line in lines(document):
            screen.say(line)
        write_json(json, document)


def _say_next_approve(request: Path, *, replace: bool = False) -> None:
    flag = " --replace" if replace else ""
    print(f"Next: bring {request} to the coordinator, and run there:")
    print(f"  sotto keys approve {request.name} --state STATE{flag}")


def _say_authority(fingerprint: str) -> None:
    print(f"Both sides should see the same authority: {fingerprint}")


@contextmanager
def _sentences() -> Iterator[None]:
    """Show an expected error as the sentence it is."""
    try:
        yield
    except SottoError as error:
        print(f"sotto: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        print(f"sotto: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(1) from None

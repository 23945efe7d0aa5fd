"""What JAX compiles in a `with` block."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """A list that gets an entry for every program compiled inside of the block."""
    found = []

    def heard(event, _, **more):
        found.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)

"""What the live state becomes after Redis lost it: it was emptied, or an older copy of it was restored."""

from collections.abc import Callable, Sequence

from range_store.domain.live import AuditEntry, LiveState, is_at_least, new_epoch


def recovered_state(
    held: LiveState, stored: LiveState | None, read_audit: Callable[[], Sequence[AuditEntry]], now: float
) -> LiveState | None:
    """Return the state to write where the `stored` one lacks changes of the `held` one that Redis had before.

    What was held is restored in a new epoch, so that no generation names two states, except for what operators changed
    since. They decide on the concepts that they name; on all erasures that are not enforced, if they replaced all; and
    on the range set, if they activated one. Only an operator who names an enforced erasure removes it.

    Args:
        read_audit: returns the audit, newest first; called only if operators may have changed something since.
        now: Unix time; expired erasures are not restored.

    Returns:
        None if `stored` includes everything that was held.
    """
    erasures = held.active_at(now)
    if stored is None:
        return new_epoch([held], held.range_set, erasures)
    if stored == held or (stored.is_at_least(held.generation) and stored.generation != held.generation):
        return None
    if held.is_at_least(stored.generation):  # an older copy, or one that was changed differently since
        return new_epoch([held, stored], held.range_set, erasures)
    since = _operator_changes(held, stored, read_audit())
    named = {concept for change in since for concept in (*change.concepts, *change.dropped)}
    replaced = any(change.action == "replace" for change in since)
    from_older_copy = any(held.is_at_least(generation) for generation in stored.continues)
    ours = {each.concept: each for each in erasures if each.concept not in named and (each.enforced or not replaced)}
    theirs = {each.concept: each for each in stored.active_at(now) if each.concept in named or not from_older_copy}
    activated = any(change.action == "activate" for change in since)
    range_set = stored.range_set if stored.range_set and (activated or not from_older_copy) else held.range_set
    after = new_epoch([held, stored], range_set, tuple((theirs | ours).values()))
    return None if (range_set, after.erasures) == (stored.range_set, stored.active_at(now)) else after


def _operator_changes(held: LiveState, stored: LiveState, audit: Sequence[AuditEntry]) -> list[AuditEntry]:
    """Return the changes that operators made after `held` and up to `stored`, as far as the audit reaches back."""
    changes = []
    for entry in audit:
        if entry.after != stored.generation and is_at_least(entry.after, stored.generation):
            continue  # made after the state was read, e.g. by another server that restores
        if held.is_at_least(entry.after):
            break
        if entry.action in ("set", "remove", "replace", "activate"):
            changes.append(entry)
    return changes

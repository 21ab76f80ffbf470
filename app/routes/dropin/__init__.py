"""Routes of other servers' protocols, so that their clients need no change: one module each (docs/dropin.md)."""

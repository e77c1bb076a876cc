"""The routes of the scan modes, the table of ``csrc/common/routes.h`` (a test compares)."""

# the four routes of a mode as (column-major, reversed); a mode's place is its number
ROUTES = {
    'cross2d': ((False, False), (True, False), (False, True), (True, True)),
    'unidi': ((False, False),) * 4,
    'bidi': ((False, False), (False, False), (False, True), (False, True)),
    'cascade2d': ((False, False), (False, True), (True, False), (True, True)),
}

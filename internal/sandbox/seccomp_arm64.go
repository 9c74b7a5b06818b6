package sandbox

import "golang.org/x/sys/unix"

// refusedHere are calls that this architecture alone has: none.
var refusedHere []uintptr

// onlyHere are the forms in which this architecture has what Syscalls.Only leaves.
var onlyHere = []uintptr{unix.SYS_NEWFSTATAT}

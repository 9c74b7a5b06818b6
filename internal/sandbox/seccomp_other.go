//go:build !amd64 && !arm64

package sandbox

// No filter was written for this architecture, and restrictSyscalls says so.
var refusedHere, onlyHere []uintptr

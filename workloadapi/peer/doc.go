// Package peer says who is at the other end of a Unix socket: it pins the process that connected by a pidfd, so that
// nothing read about it later can be about another process that got the same process id.
//
// The Workload API endpoint, and every other listener that answers local processes, uses its transport credentials.
// The package never decides what a process may have.
//
// What a pidfd does not show is that the process changes itself: exec and changes of user leave it valid. Process.Snapshot
// reads the attributes that such a change touches, between two checks that the process lives.
package peer

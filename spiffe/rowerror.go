package spiffe

import (
	"errors"
	"fmt"
)

// A RowError says which row of the conformance checklist an input breaks, such as "X509-47". The validators of this
// package return no other kind of error.
type RowError struct {
	// Row is the id of the broken row.
	Row string
	// Err says what is wrong, with which value, and what would be right.
	Err error
}

// Error returns the text of the cause, followed by the row.
func (e *RowError) Error() string { return e.Err.Error() + " [" + e.Row + "]" }

// Unwrap returns the cause. It may be another RowError: a certificate whose ID is malformed breaks X509-49 because the
// ID breaks, say, ID-13.
func (e *RowError) Unwrap() error { return e.Err }

// RowOf returns the outermost row of err, or "" if err has none.
func RowOf(err error) string {
	var r *RowError
	if errors.As(err, &r) {
		return r.Row
	}
	return ""
}

// broken returns a RowError with a formatted cause.
func broken(row, format string, args ...any) error {
	return &RowError{Row: row, Err: fmt.Errorf(format, args...)}
}

// maxExcerpt is how much of a foreign string an error repeats, in bytes.
const maxExcerpt = 128

// excerpt shortens a foreign string for an error message. The caller prints it with %q.
func excerpt(s string) string {
	if len(s) <= maxExcerpt {
		return s
	}
	return s[:maxExcerpt] + "..."
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A hintedError is an error for which we know what to do next.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() }
func (e *hintedError) Unwrap() error { return e.err }
func (e *hintedError) Hint() string  { return e.hint }

// withHint returns err with the operator's next step.
func withHint(err error, format string, args ...any) error {
	return &hintedError{err: err, hint: fmt.Sprintf(format, args...)}
}

// printError writes err as "signet: error: ..." and its hint, if any, as "signet: hint: ...". Text that came from
// elsewhere is escaped; lines after the first are indented.
func printError(w io.Writer, color bool, err error) {
	text := strings.TrimRight(err.Error(), "\n")
	for i, line := range strings.Split(text, "\n") {
		if i == 0 {
			fmt.Fprintf(w, "signet: %s %s\n", paint(color, red, "error:"), escape(line))
			continue
		}
		fmt.Fprintf(w, "  %s\n", escape(line))
	}
	var h interface{ Hint() string }
	if errors.As(err, &h) && h.Hint() != "" {
		fmt.Fprintf(w, "signet: %s %s\n", paint(color, cyan, "hint:"), escape(h.Hint()))
	}
}

// note tells the person at the terminal something that is not the result.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.stderr, "signet: %s\n", escape(fmt.Sprintf(format, args...)))
}

// caError makes an error of an RPC readable: what was being done, the CA's own words, and the next step by code.
func caError(doing string, c *caConn, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return statusError(doing, c, st.Code(), st.Message())
}

// statusError does the same for the status of one item of a batch.
func statusError(doing string, c *caConn, code codes.Code, message string) error {
	said := &remoteError{doing: doing, code: code, message: message}
	switch code {
	case codes.Unavailable:
		if cause := c.dialError(); cause != nil {
			return c.unreachable(cause)
		}
		return withHint(said, "the CA is there but not ready, or the connection broke: try again")
	case codes.DeadlineExceeded:
		if cause := c.dialError(); cause != nil {
			return c.unreachable(cause)
		}
		return withHint(said, "the CA did not answer in time; --timeout sets how long to wait")
	case codes.PermissionDenied:
		if c.overTCP {
			return withHint(said, "over TCP only IDs under admin_ids of the CA, or entries with --admin, may do this; or use --socket on the CA's host")
		}
		return withHint(said, "on the admin socket root, the CA's own user and the users of admin_socket in its configuration are admins")
	case codes.Unauthenticated:
		return withHint(said, "the CA did not accept who is calling: see its log")
	case codes.Unimplemented:
		return withHint(said, "the CA does not offer this: it may be older than this program, or it is not signet")
	case codes.ResourceExhausted:
		return withHint(said, "the request is over a limit of the CA: send less at once, or wait")
	}
	return said
}

// A remoteError is a refusal in the CA's words.
type remoteError struct {
	doing   string
	code    codes.Code
	message string
}

func (e *remoteError) Error() string {
	message := e.message
	if message == "" {
		message = e.code.String()
	}
	return e.doing + ": " + message
}

// isCode tells whether err is the CA's refusal with that code.
func isCode(err error, code codes.Code) bool {
	var e *remoteError
	return errors.As(err, &e) && e.code == code
}

// untilCanceled makes the end of a command that runs until told (watch, tail) a success.
func untilCanceled(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || isCode(err, codes.Canceled) || status.Code(err) == codes.Canceled) {
		return nil
	}
	return err
}

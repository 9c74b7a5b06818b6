// Package demo is the command "demo": the whole product in front of one's eyes. It runs a CA, an agent and three services
// as processes of their own, lets them call each other, and checks everything that it shows. It uses the command line as
// a person would, and needs no root, no fixed port and no configuration.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Config says how the demo is shown.
type Config struct {
	// Program is the path of the signet program, of which all processes of the demo are copies.
	Program string
	// Stdout gets what is shown. The demo stops if it cannot be written to.
	Stdout io.Writer
	// Color and Unicode say what Stdout can show.
	Color, Unicode bool
	// Keep leaves everything running after the last check, until the context ends.
	Keep bool
}

// ErrStopped says that the demo was stopped from outside before its end.
var ErrStopped = errors.New("stopped before its end")

// Run shows the demo. It returns nil if every check passed, the *CheckError of the first one that did not, or what else
// went wrong. When it returns, all its processes have ended and its directory is gone, except that after a failure a
// directory that was to be kept stays.
func Run(ctx context.Context, c Config) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stage, err := newStage(c.Program, cancel)
	if err != nil {
		return err
	}
	s := &show{report: report{w: c.Stdout, unread: cancel, color: c.Color, unicode: c.Unicode}, stage: stage, began: time.Now()}
	err = s.run(ctx)
	if err != nil {
		err = s.explain(ctx, err)
	} else if c.Keep {
		s.line("\ndemo: %d checks passed", s.checks)
		err = s.keep(ctx)
	}
	if closed := stage.close(c.Keep && err != nil); closed != nil {
		err = errors.Join(err, closed)
	}
	switch {
	case err == nil && !c.Keep:
		s.line("\ndemo: %d checks passed", s.checks)
	case err != nil && c.Keep:
		s.line("\nthe files of the demo are in %s", stage.dir)
	}
	return err
}

// A show is one run of the demo.
type show struct {
	report
	*stage
	began time.Time
}

func (s *show) run(ctx context.Context) error {
	s.line("A CA, an agent and three services, each a process of its own, in %s.", s.dir)
	for _, step := range []func(context.Context) error{
		s.issue, s.callAndRefuse, s.why, s.tokens, s.rotate, s.changePolicy, s.tryOut, s.revoke, s.killAgent, s.killCA, s.finish,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// explain shows what went wrong, and returns the error that says it in one line.
func (s *show) explain(ctx context.Context, err error) error {
	var lost *lostError
	switch {
	case errors.As(context.Cause(ctx), &lost):
		err = lost // what else went wrong is a consequence
	case ctx.Err() != nil:
		return ErrStopped
	}
	var failed *CheckError
	if errors.As(err, &failed) {
		s.failed(failed)
	} else {
		s.line("   %s %s", s.mark(false), printable(err.Error()))
	}
	for _, name := range []string{"ca", "agent", Documents, Trusty, Utility} {
		if text := s.crew.tail(name); text != "" {
			s.logs(name, text)
		}
	}
	return fmt.Errorf("after %d checks that passed: %w", s.checks, err)
}

// keep says what there is to play with and waits until ctx ends. That is how it should end; a lost process is an error.
func (s *show) keep(ctx context.Context) error {
	s.line(`
Everything goes on running in %[1]s until you press Ctrl-C. In another terminal:

   export SIGNET_CA_SOCKET=%[2]s SPIFFE_ENDPOINT_SOCKET=%[3]s
   cd %[1]s && PATH=%[1]s/bin:$PATH

   signet get identities                       who is who
   signet get policies -o yaml                 who may call whom
   signet apply -f policy-open.yaml            now utility-service may read, too; -f policy.yaml: not any more
   signet policy explain --from /utility-service --to /documents-service --http "GET /v1/documents/7"
   trusty-service svid fetch x509              any command from there is trusty-service to the agent
   signet audit tail                           what the CA has issued

   curl --unix-socket %[4]s 'http://demo/call?path=/v1/documents/7'
   curl --unix-socket %[5]s 'http://demo/call?path=/v1/documents/7'
   curl --unix-socket %[4]s 'http://demo/call?path=/v1/archive/7&audience=documents'

   CA at %[6]s, documents-service at https://%[7]s, logs in %[1]s/log`,
		s.dir, s.caSocket(), s.endpoint(), s.control(Trusty), s.control(Utility), s.caAddr, s.documents)
	<-ctx.Done()
	var lost *lostError
	if errors.As(context.Cause(ctx), &lost) {
		return lost
	}
	return nil
}

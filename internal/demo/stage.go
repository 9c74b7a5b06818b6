package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	trustDomain = "demo.example"
	startWait   = 20 * time.Second     // for a process to answer
	lookEvery   = 5 * time.Millisecond // while waiting for what cannot be watched
	longestPath = 107                  // of a Unix socket, in bytes
	maxAnswer   = 1 << 20              // bytes of an answer on a control socket
)

// A stage is the directory and the processes that the demo happens in.
type stage struct {
	dir     string
	program string // the copy of the own program in dir
	crew    *crew
	caAddr  string

	ca, agent *process
	services  map[string]*process
	documents string // address of the documents-service
}

// newStage makes the directory with the programs and all files in it. The program is copied once and linked under the
// name of each service, because its path is what a service is recognised by.
func newStage(program string, lost func(error)) (*stage, error) {
	dir, err := os.MkdirTemp("", "signet-demo-")
	if err != nil {
		return nil, fmt.Errorf("making a directory (TMPDIR says where): %w", err)
	}
	s := &stage{services: make(map[string]*process)}
	if s.dir, err = filepath.EvalSymlinks(dir); err != nil { // the agent sees the path that the kernel sees
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if longest := s.control(Documents); len(longest) > longestPath {
		return nil, errors.Join(fmt.Errorf("the path %q of a socket has %d bytes, more than %d: set TMPDIR to a shorter one", longest, len(longest), longestPath), os.RemoveAll(dir))
	}
	if err := s.furnish(program); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	s.crew = newCrew(filepath.Join(s.dir, "log"), []string{"NO_COLOR=1", "SIGNET_CA_SOCKET=" + s.caSocket(), "SPIFFE_ENDPOINT_SOCKET=" + s.endpoint()}, lost)
	return s, nil
}

func (s *stage) caSocket() string           { return filepath.Join(s.dir, "ca.sock") }
func (s *stage) endpoint() string           { return "unix://" + filepath.Join(s.dir, "agent.sock") }
func (s *stage) control(name string) string { return filepath.Join(s.dir, name+".sock") }
func (s *stage) binary(name string) string  { return filepath.Join(s.dir, "bin", name) }

func (s *stage) furnish(program string) error {
	for _, sub := range []string{"bin", "log"} {
		if err := os.Mkdir(filepath.Join(s.dir, sub), 0o700); err != nil {
			return err
		}
	}
	s.program = s.binary("signet")
	if err := copyProgram(s.program, program); err != nil {
		return err
	}
	for _, name := range []string{Documents, Trusty, Utility} {
		if err := os.Link(s.program, s.binary(name)); err != nil {
			return err
		}
	}
	return s.write(s.documentFiles())
}

func (s *stage) write(files map[string]string) error {
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func copyProgram(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// close ends all processes and removes the directory, unless it is to be kept.
func (s *stage) close(keep bool) error {
	s.crew.close()
	if keep {
		return nil
	}
	return os.RemoveAll(s.dir)
}

// startCA starts the CA. Its port is a free one; should somebody take it meanwhile, another one is tried.
func (s *stage) startCA(ctx context.Context) error {
	again := s.caAddr != "" // agents expect it where it was
	for try := 1; ; try++ {
		if !again {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			s.caAddr = l.Addr().String()
			l.Close()
		}
		if err := s.write(map[string]string{"ca.yaml": s.caConfig(), "agent.yaml": s.agentConfig()}); err != nil {
			return err
		}
		err := s.tryCA(ctx)
		if err == nil || ctx.Err() != nil || again || try == 3 || !strings.Contains(s.crew.tail("ca"), "address already in use") {
			return err
		}
	}
}

func (s *stage) tryCA(ctx context.Context) error {
	var err error
	if s.ca, err = s.crew.start("ca", s.program, "ca", "run", "--config", "ca.yaml"); err != nil {
		return err
	}
	return s.until(ctx, s.ca, "answer on its admin socket", func(context.Context) error {
		conn, err := net.Dial("unix", s.caSocket())
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// startAgent starts the agent and waits until it holds the CA's state. The demo itself asks for an SVID meanwhile: before
// that the agent cannot say, and after it the answer is that there is none.
func (s *stage) startAgent(ctx context.Context) error {
	var err error
	if s.agent, err = s.crew.start("agent", s.program, "agent", "run", "--config", "agent.yaml"); err != nil {
		return err
	}
	return s.until(ctx, s.agent, "know the CA's state", func(ctx context.Context) error {
		err := s.askAsStranger(ctx)
		if err == nil || status.Code(err) == codes.PermissionDenied {
			return nil
		}
		return err
	})
}

// askAsStranger asks the agent for the demo's own X509-SVID.
func (s *stage) askAsStranger(ctx context.Context) error {
	// A new client each time: one that found no agent waits a second before it looks again.
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.endpoint()))
	if err != nil {
		return err
	}
	defer client.Close()
	_, err = client.FetchX509SVID(ctx)
	return err
}

// startService starts a service and waits until it has its identity.
func (s *stage) startService(ctx context.Context, name string) (state, error) {
	var st state
	args := []string{"demo-service", name, "--control", s.control(name)}
	if name != Documents {
		args = append(args, "--documents", s.documents)
	}
	p, err := s.crew.start(name, s.binary(name), args...)
	if err != nil {
		return st, err
	}
	s.services[name] = p
	err = s.until(ctx, p, "get its identity", func(ctx context.Context) error {
		var err error
		st, err = s.state(ctx, name)
		return err
	})
	if name == Documents {
		s.documents = st.Listen
	}
	return st, err
}

// until looks again and again until ready returns nil, which must be before startWait is over and p has ended.
func (s *stage) until(ctx context.Context, p *process, what string, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return p.err
		case <-ctx.Done():
			return fmt.Errorf("%s did not %s within %v: %w", p.name, what, startWait, err)
		case <-tick.C:
		}
	}
}

// state asks a service about itself.
func (s *stage) state(ctx context.Context, name string) (state, error) {
	var st state
	return st, s.ask(ctx, name, http.MethodGet, "/state", &st)
}

// call makes a service call the documents-service.
func (s *stage) call(ctx context.Context, name, method, path, audience string) (outcome, error) {
	var o outcome
	q := url.Values{"method": {method}, "path": {path}, "audience": {audience}}
	return o, s.ask(ctx, name, http.MethodGet, "/call?"+q.Encode(), &o)
}

// ask asks a service on its control socket.
func (s *stage) ask(ctx context.Context, name, method, target string, into any) error {
	client := &http.Client{Timeout: startWait, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", s.control(name))
		}}}
	request, err := http.NewRequestWithContext(ctx, method, "http://"+name+target, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("asking %s: %w", name, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("asking %s: %w", name, err)
	}
	switch {
	case response.StatusCode == http.StatusNoContent:
		return nil
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("asking %s: %s: %s", name, response.Status, body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("asking %s: %w", name, err)
	}
	return nil
}

// signet runs a command of the command line, as a person would.
func (s *stage) signet(ctx context.Context, args ...string) (string, error) {
	return s.crew.run(ctx, s.program, args...)
}

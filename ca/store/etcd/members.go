package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/signet-id/signet/ca/store"
)

const (
	// statusTimeout bounds how long one member is asked how it is.
	statusTimeout = time.Second

	// retrySuspects is how often members that did not answer are asked again.
	retrySuspects = 5 * time.Second
)

var alarmNoSpace = pb.AlarmType_NOSPACE.String()

// members knows which members of etcd do not answer. A member that has died is avoided by gRPC itself. One that hangs, its kernel
// still taking what is sent, would hold up its share of the requests until the connection's keepalive fails: it is left out until
// it answers again.
type members struct {
	all  []string
	look chan struct{} // one slot: ask them now

	// dialing is held for reading while the client may dial a member, for it reads there what SetEndpoints writes.
	dialing sync.RWMutex

	mu    sync.Mutex // guards all below
	using []string
	down  []string // at the last look, in which at least one was down
}

func newMembers(all []string) *members {
	return &members{all: all, using: all, look: make(chan struct{}, 1)}
}

// suspect has all members asked.
func (m *members) suspect() { signal(m.look) }

func (m *members) health() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.down) == len(m.all) {
		return fmt.Errorf("%w: no member of etcd answers: %s", store.ErrUnavailable, strings.Join(m.down, ", "))
	}
	return nil
}

// Down returns the endpoints that did not answer when they were last asked.
func (s *Store) Down() []string {
	s.members.mu.Lock()
	defer s.members.mu.Unlock()
	return slices.Clone(s.members.down)
}

// keepMembers asks the members after a request that was not answered, and again while one is down.
func (s *Store) keepMembers() {
	m := s.members
	for {
		again := time.NewTimer(jittered(retrySuspects))
		if len(s.Down()) == 0 {
			again.Stop()
		}
		select {
		case <-s.closing.Done():
			again.Stop()
			return
		case <-m.look:
			again.Stop()
		case <-again.C:
		}
		s.askMembers(s.closing)
		// One look serves all requests that failed at the same time.
		if !pause(s.closing, jittered(200*time.Millisecond)) {
			return
		}
	}
}

func (s *Store) askMembers(ctx context.Context) {
	m := s.members
	var wg sync.WaitGroup
	ok := make([]bool, len(m.all))
	for i, e := range m.all {
		wg.Go(func() {
			_, err := s.status(ctx, e)
			ok[i] = err == nil
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return
	}
	var up, down []string
	for i, e := range m.all {
		if ok[i] {
			up = append(up, e)
		} else {
			down = append(down, e)
		}
	}
	using := up
	if len(up) == 0 {
		using = m.all
	}
	m.mu.Lock()
	same, changed := slices.Equal(using, m.using), !slices.Equal(down, m.down)
	m.using, m.down = using, down
	m.mu.Unlock()
	if changed {
		s.c.Log.Warn("members of etcd that answer", "up", up, "down", down)
	}
	if !same {
		m.dialing.Lock()
		s.client.SetEndpoints(using...)
		m.dialing.Unlock()
	}
}

// status asks one member how it is. It answers from what it has itself, without the others.
func (s *Store) status(ctx context.Context, endpoint string) (sizes, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	s.members.dialing.RLock()
	rsp, err := s.client.Status(ctx, endpoint)
	s.members.dialing.RUnlock()
	if err != nil {
		return sizes{}, err
	}
	return sizes{size: rsp.DbSize, inUse: rsp.DbSizeInUse, quota: rsp.DbSizeQuota, alarms: alarms(rsp.Errors)}, nil
}

// alarms names those of a member that keep it from writing.
func alarms(errs []string) []string {
	var out []string
	for _, e := range errs {
		if strings.Contains(e, alarmNoSpace) {
			out = append(out, alarmNoSpace)
		}
	}
	return out
}

// reach says how each member can be reached, for an operator whose configuration does not work: the client tells nothing but that
// it waited.
func (c *Config) reach(ctx context.Context, t *tls.Config) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	errs := make([]error, len(c.Endpoints))
	var wg sync.WaitGroup
	for i, e := range c.Endpoints {
		wg.Go(func() { errs[i] = reach(ctx, e, t) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func reach(ctx context.Context, endpoint string, t *tls.Config) error {
	u, err := url.Parse(endpoint)
	if err != nil {
		return err
	}
	network, address := "tcp", u.Host
	if u.Scheme == "unix" {
		network, address = "unix", u.Path
	}
	var conn net.Conn
	if t == nil {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
	} else {
		conn, err = (&tls.Dialer{Config: t}).DialContext(ctx, network, address)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", endpoint, err)
	}
	conn.Close()
	return fmt.Errorf("%s: it can be reached, but has no leader, or refuses the client", endpoint)
}

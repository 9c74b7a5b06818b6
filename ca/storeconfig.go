package ca

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/ca/store/etcd"
)

// StoreConfig says where the CA's state is.
type StoreConfig struct {
	// Etcd is an etcd that several replicas of the CA share. Absent: the state is in data_dir, for one CA.
	Etcd *Etcd `yaml:"etcd"`
}

// Etcd says which etcd, and what of it is ours. Each replica has a data_dir of its own beside it, for the audit log. Who can write
// below the prefix owns the trust domain.
type Etcd struct {
	// Endpoints are the client URLs of etcd's members, such as https://10.0.0.1:2379. http is taken for loopback addresses only,
	// and unix:// for a socket.
	Endpoints []string `yaml:"endpoints"`
	// Prefix is what our keys begin with; it ends in a slash. The user needs a role that may read and write it, and no more.
	// Default: /signet/, the trust domain and a slash.
	Prefix string `yaml:"prefix"`
	// TLS is needed for https endpoints.
	TLS EtcdTLS `yaml:"tls"`
	// Username is a user of etcd, instead of a client certificate or besides one.
	Username string `yaml:"username"`
	// PasswordFile is a file with mode 0600, or of root's with 0640, that holds the user's password.
	PasswordFile string `yaml:"password_file"`
	// Timeout bounds one request. Default 5s.
	Timeout time.Duration `yaml:"timeout"`
	// Reserve is the room, out of etcd's quota, that is kept for renewals. Default 64 MiB; at most an eighth of the quota counts.
	Reserve int64 `yaml:"reserve_bytes"`
	// Compaction is how long history is kept; one of the replicas removes what is older. Default 5m. -1ns: etcd does it itself, as it
	// has to where its authentication is on (--auto-compaction-mode periodic --auto-compaction-retention 10m).
	Compaction time.Duration `yaml:"compaction"`
	// MaxStaleness is how long a replica that reaches no quorum of etcd goes on serving agents from what it has in memory: it
	// cannot know whom another replica banned meanwhile. Default 1h.
	MaxStaleness time.Duration `yaml:"max_staleness"`
}

// EtcdTLS says how etcd's members are known, and how they know the CA.
type EtcdTLS struct {
	// CAFile holds the authorities of the members' certificates in PEM. The machine's own roots do not count.
	CAFile string `yaml:"ca_file"`
	// CertFile is the CA's certificate for etcd in PEM. It is read again for each connection.
	CertFile string `yaml:"cert_file"`
	// KeyFile is the certificate's key, with mode 0600, or of root's with 0640: so Kubernetes mounts Secrets.
	KeyFile string `yaml:"key_file"`
}

const minStaleness = 10 * time.Second

// check refuses what cannot work.
func (s *StoreConfig) check(c *Config, bad func(field, format string, args ...any)) {
	e := s.Etcd
	if e == nil {
		return
	}
	if e.Prefix == "" {
		e.Prefix = "/signet/" + c.TrustDomain + "/"
	}
	switch {
	case e.MaxStaleness == 0:
		e.MaxStaleness = time.Hour
	case e.MaxStaleness < minStaleness:
		bad("store.etcd.max_staleness", "%v is shorter than %v, in which etcd elects a leader and a replica notices", e.MaxStaleness, minStaleness)
	}
	for field, path := range map[string]string{"tls.ca_file": e.TLS.CAFile, "tls.cert_file": e.TLS.CertFile, "tls.key_file": e.TLS.KeyFile, "password_file": e.PasswordFile} {
		if path != "" && !filepath.IsAbs(path) {
			bad("store.etcd."+field, "%q must be absolute", path)
		}
	}
	if c.Seal.Create {
		bad("seal.create", "is not for several replicas, of which each would make a seal key of its own; make one key file (head -c 32 /dev/urandom, mode 0600) and give it to all")
	}
	ec := e.config(c)
	ec.Check(func(field, format string, args ...any) { bad("store.etcd."+field, format, args...) })
}

func (e *Etcd) config(c *Config) etcd.Config {
	return etcd.Config{Endpoints: e.Endpoints, Prefix: e.Prefix, CAFile: e.TLS.CAFile, CertFile: e.TLS.CertFile, KeyFile: e.TLS.KeyFile, Username: e.Username, PasswordFile: e.PasswordFile,
		Timeout: e.Timeout, Reserve: e.Reserve, Compaction: e.Compaction, Dir: filepath.Join(c.DataDir, "store")}
}

// opened is what the CA needs of its store besides store.Store.
type opened interface {
	store.Store
	// Health returns nil if the store takes every commit, or what keeps it from that.
	Health() error
}

// openStore opens the store that the configuration names.
func (ca *CA) openStore(ctx context.Context) (err error) {
	if ca.c.Store.Etcd == nil {
		s, err := bolt.Open(bolt.Config{Dir: filepath.Join(ca.c.DataDir, "store"), Log: ca.log})
		if err != nil {
			return err
		}
		ca.opened = s
		return nil
	}
	// The lock of a data directory is for all that is in it; with etcd nothing else takes it.
	if ca.dirLock, err = bolt.Lock(filepath.Join(ca.c.DataDir, "store")); err != nil {
		return fmt.Errorf("data_dir %s: %w", ca.c.DataDir, err)
	}
	c := ca.c.Store.Etcd.config(&ca.c)
	c.Log = ca.log
	s, err := etcd.Open(ctx, c)
	if err != nil {
		return fmt.Errorf("store.etcd: %w", err)
	}
	ca.opened, ca.shared = s, s
	return nil
}

// replicated tells whether other replicas of the CA may run on the same store.
func (ca *CA) replicated() bool { return ca.shared != nil }

// Looks at whether the index is up to date, of a CA on etcd.
const (
	freshEvery   = 5 * time.Second
	freshTimeout = 5 * time.Second
)

// keepFresh finds out again and again, until ctx ends, that all that a quorum of etcd has is in memory.
func (ca *CA) keepFresh(ctx context.Context) error {
	if ca.shared == nil {
		return nil
	}
	for {
		began := time.Now()
		bctx, cancel := context.WithTimeout(ctx, freshTimeout)
		_, err := ca.reg.Barrier(bctx)
		cancel()
		if err == nil {
			ca.freshAt.Store(&began)
		}
		if !sleep(ctx, freshEvery) {
			return nil
		}
	}
}

// staleFor is for how long it has not been known that all that others committed is in memory.
func (ca *CA) staleFor() time.Duration {
	if at := ca.freshAt.Load(); ca.shared != nil && at != nil {
		return time.Since(*at)
	}
	return 0
}

// storeProblem tells an operator of a store that does not answer, while agents are still served.
func (ca *CA) storeProblem() error {
	if ca.shared == nil {
		return nil
	}
	if down := ca.shared.Down(); len(down) > 0 {
		return fmt.Errorf("members of etcd that do not answer: %s", strings.Join(down, ", "))
	}
	if age := ca.staleFor(); age > freshEvery+freshTimeout {
		return fmt.Errorf("the store has not been reached for %v; agents are served from memory for %v", age.Round(time.Second), ca.c.Store.Etcd.MaxStaleness)
	}
	return nil
}

// storeHealth returns why the store keeps the CA from its work.
func (ca *CA) storeHealth() error {
	if err := ca.tooStale(); err != nil {
		return errors.New(status.Convert(err).Message())
	}
	err := ca.opened.Health()
	if ca.shared != nil && errors.Is(err, store.ErrUnavailable) {
		return nil // agents are served until it is too stale
	}
	return err
}

// tooStale refuses agents once this replica has had no contact with a quorum of etcd for so long that it may not know who was
// banned, and what was revoked. They go to another replica.
func (ca *CA) tooStale() error {
	if age := ca.staleFor(); ca.shared != nil && age > ca.c.Store.Etcd.MaxStaleness {
		return status.Errorf(codes.Unavailable, "this replica of the CA has not reached the store for %v; try another one", age.Round(time.Second))
	}
	return nil
}

// readBarrier bounds the wait of an operator's call for what other replicas have committed.
const readBarrier = 2 * time.Second

// fresh makes an operator's call see what was acknowledged to anyone before, at any replica. If the store does not answer, the call
// goes on with what is in memory: the operator may be looking why.
func (ca *CA) fresh(ctx context.Context, c *access.Caller) {
	if ca.shared == nil || c.Kind&(access.Local|access.Admin) == 0 {
		return
	}
	bctx, cancel := context.WithTimeout(ctx, readBarrier)
	defer cancel()
	if _, err := ca.reg.Barrier(bctx); err != nil && ctx.Err() == nil {
		ca.log.Warn("an operator is answered from memory, since the store does not answer", "err", err)
	}
}

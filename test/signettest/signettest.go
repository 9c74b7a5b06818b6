// Package signettest gives tests a real CA and a real agent in a temporary directory, ready in well under a second.
package signettest

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
)

// Config changes what is started. The zero value is a trust domain example.org.
type Config struct {
	TrustDomain string
	NodeGroups  []string
	CA          func(*ca.Config)
	Agent       func(*agent.Config)
	Now         func() time.Time
	Log         *slog.Logger
}

// A Signet is a running CA and agent. It ends with the test.
type Signet struct {
	*dev.Instance
	t     testing.TB
	admin *grpc.ClientConn
}

// Start starts a CA and an agent and returns when workloads can be served.
func Start(t testing.TB, c Config) *Signet {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet") // short: a Unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	i, err := dev.Start(context.Background(), dev.Config{Dir: dir, TrustDomain: c.TrustDomain, NodeGroups: c.NodeGroups, Now: c.Now, Log: c.Log, Agent: c.Agent,
		CA: func(cc *ca.Config) {
			cc.Audit.Reserve = 1 << 20
			if c.CA != nil {
				c.CA(cc)
			}
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Errorf("closing signet: %v", err)
		}
	})
	s := &Signet{Instance: i, t: t}
	if s.admin, err = i.Admin(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.admin.Close() })
	return s
}

// AdminConn is a connection to the admin socket that lives as long as the test.
func (s *Signet) AdminConn() *grpc.ClientConn { return s.admin }

// Apply applies documents and returns the revision.
func (s *Signet) Apply(docs string) int64 {
	s.t.Helper()
	r, err := adminv1.NewAdminClient(s.admin).Apply(context.Background(), &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs), File: "test.yaml"}}})
	if err != nil {
		s.t.Fatalf("apply: %v", err)
	}
	return r.Revision
}

// Delete deletes a resource.
func (s *Signet) Delete(kind, name string) {
	s.t.Helper()
	if _, err := adminv1.NewAdminClient(s.admin).DeleteResource(context.Background(), &adminv1.DeleteResourceRequest{Kind: kind, Name: name, Yes: true}); err != nil {
		s.t.Fatalf("delete %s %s: %v", kind, name, err)
	}
}

// ID returns a SPIFFE ID of the trust domain.
func (s *Signet) ID(path string) spiffeid.ID {
	s.t.Helper()
	return spiffeid.RequireFromPath(s.TrustDomain(), path)
}

// Package upgrade starts this version on the state that earlier formats left behind.
package upgrade

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "make testdata/state-v1.tar.gz anew; only as long as version 1 has not been released")

// made is when the state was made. The authorities and SVIDs in it are valid then.
var made = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

const golden = "testdata/state-v1.tar.gz"

// clock returns a clock that stood at t when it was made.
func clock(t time.Time) func() time.Time {
	start := time.Now()
	return func() time.Time { return t.Add(time.Since(start)) }
}

func config(dir string, now func() time.Time) dev.Config {
	return dev.Config{Dir: dir, Now: now, Log: slog.New(slog.DiscardHandler), NodeGroups: []string{"backend"}, CA: func(c *ca.Config) { c.Audit.Reserve = 1 << 20 }}
}

var documents = fmt.Sprintf(`kind: Identity
name: web
spiffeID: /web
match: ["unix:uid:%d"]
on: ["node:group:backend"]
---
kind: CallPolicy
name: web
service: /web
allow:
  - from: [/caller]
    http: [{methods: [GET], paths: [/v1/**]}]
---
kind: PolicyDefaults
name: default
mode: shadow
`, os.Getuid())

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestStateOfVersion1 starts CA and agent on the state of version 1: the same authorities, the same node, the same
// documents, the same audit log, and an SVID for who had one.
func TestStateOfVersion1(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if *update {
		makeGolden(ctx, t)
	}
	dir := tempDir(t)
	unpack(t, dir)
	s, err := dev.Start(ctx, config(dir, clock(made.Add(10*time.Minute))))
	if err != nil {
		t.Fatalf("this version does not start on the state of version 1: %v", err)
	}
	defer s.Close()
	conn, err := s.Admin()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	api := adminv1.NewAdminClient(conn)
	for _, kind := range []string{"Identity", "CallPolicy", "PolicyDefaults"} {
		r, err := api.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: kind})
		if err != nil || len(r.Resources) != 1 || !strings.Contains(string(r.Resources[0].Document.Content), "kind: "+kind) {
			t.Errorf("%s: %v %v", kind, r, err)
		}
	}
	set, err := api.GetPolicySet(ctx, &adminv1.GetPolicySetRequest{})
	if err != nil || len(set.Policies.Policies) != 1 || len(set.Policies.Policies[0].Rules) != 1 {
		t.Errorf("policies: %v %v", set, err)
	}
	agents, err := api.ListAgentStatus(ctx, &adminv1.ListAgentStatusRequest{})
	if err != nil || len(agents.Agents) != 1 || !agents.Agents[0].Connected {
		t.Errorf("the node is another one now, or is not connected: %v %v", agents, err)
	}
	search, err := api.SearchAudit(ctx, &adminv1.SearchAuditRequest{Events: []string{"agent.attested"}})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := search.Recv()
	var line struct{ Time time.Time }
	if err != nil || json.Unmarshal(rec.Json, &line) != nil || line.Time.Sub(made).Abs() > time.Minute {
		t.Errorf("the audit record of the attestation: %s %v", rec.GetJson(), err)
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if os.Getuid() == 0 { // the state was made by root
		svid, err := client.FetchX509SVID(ctx)
		if err != nil || svid.ID.Path() != "/web" {
			t.Errorf("SVID: %v %v", svid, err)
		}
	}
}

// skipped are files of the state that hold nothing: sockets, locks and reserves of disk space.
func skipped(path string, d fs.DirEntry) bool {
	info, err := d.Info()
	return err != nil || !info.Mode().IsRegular() && !d.IsDir() || strings.Contains(filepath.Base(path), "reserve") || filepath.Base(path) == "lock"
}

func makeGolden(ctx context.Context, t *testing.T) {
	t.Helper()
	dir := tempDir(t)
	s, err := dev.Start(ctx, config(dir, clock(made)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := s.Admin()
	if err != nil {
		t.Fatal(err)
	}
	_, err = adminv1.NewAdminClient(conn).Apply(ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(documents), File: "v1.yaml"}}})
	if err := errors.Join(err, conn.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(golden)
	if err != nil {
		t.Fatal(err)
	}
	zip := gzip.NewWriter(out)
	w := tar.NewWriter(zip)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || skipped(path, d) {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(b))}); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
	if err := errors.Join(err, w.Close(), zip.Close(), out.Close()); err != nil {
		t.Fatal(err)
	}
}

func unpack(t *testing.T, dir string) {
	t.Helper()
	in, err := os.Open(golden)
	if err != nil {
		t.Fatalf("%v (make it with -update)", err)
	}
	defer in.Close()
	zip, err := gzip.NewReader(in)
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(zip)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

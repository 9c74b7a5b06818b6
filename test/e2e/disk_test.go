package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// TestDiskFull fills the CA's disk, a tmpfs in a mount namespace of its own: what exists goes on being renewed from
// the reserve, new entries are refused, health says why, and when there is room again all is as before. [DESIGN §6]
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a tmpfs in a mount namespace; CI runs as root")
	}
	ctx := bounded(t, 90*time.Second)
	f := newFleet(t)
	metrics := freePort(t)
	f.write("ca.yaml", fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/disk/ca\nadmin_socket: {path: %s/ca.sock}\nseal: {key_file: %s/seal.key, create: true}\naudit: {reserve_bytes: 8388608}\nmetrics: {listen: %q}\n",
		f.addr, f.dir, f.dir, f.dir, metrics))
	disk := f.dir + "/disk"
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	f.ca.wrap = []string{"unshare", "--mount", "sh", "-c", fmt.Sprintf(`mount -t tmpfs -o size=96m none %s && exec "$0" "$@"`, disk)}
	f.up(ctx)
	f.apply(ctx, identity("web"))
	f.await(ctx, "/web")
	ready := func() string {
		r, err := http.Get("http://" + metrics + "/ready")
		if err != nil {
			return err.Error()
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(r.Body, 4096))
		return r.Status + " " + string(b)
	}
	if got := ready(); !strings.HasPrefix(got, "200") {
		t.Fatalf("ready before: %s", got)
	}

	inside := fmt.Sprintf("/proc/%d/root%s/fill", f.ca.cmd.Process.Pid, disk) // the mount is visible there only
	fill, err := os.Create(inside)
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	chunk := make([]byte, 64<<10)
	for err == nil {
		_, err = fill.Write(chunk)
	}
	for len(chunk) > 1 { // to the last byte
		if _, err := fill.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	n := 0
	if err := eventually(ctx, func() error { // the file that is open may still have a page of room
		n++
		_, err := adminv1.NewAdminClient(f.admin).Apply(ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(identity(fmt.Sprint("fill", n))), File: "t.yaml"}}})
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "disk") {
			return fmt.Errorf("a new entry on a full disk: %v, want Unavailable that names the disk", err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got := ready(); !strings.HasPrefix(got, "503") || !strings.Contains(got, "disk") {
		t.Errorf("ready on a full disk: %s", got)
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(f.endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for i := range 20 { // each is an issuance that is logged
		if _, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: fmt.Sprint("a", i), Subject: spiffeid.RequireFromString("spiffe://example.org/web")}); err != nil {
			t.Fatalf("an existing identity on a full disk: %v", err)
		}
	}
	issued := 0
	for _, r := range audit(t, f.admin, "jwtsvid.issued") {
		if r["outcome"] == "ok" {
			issued++
		}
	}
	if issued < 20 {
		t.Errorf("%d issuances are in the audit log, want 20", issued)
	}

	if err := fill.Truncate(0); err != nil {
		t.Fatal(err)
	}
	f.apply(ctx, identity("new")) // repeats until it is accepted
	if err := eventually(ctx, func() error {
		if got := ready(); !strings.HasPrefix(got, "200") {
			return fmt.Errorf("ready with room again: %s", got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// audit reads the audit records of an event.
func audit(t *testing.T, admin *grpc.ClientConn, event string) (out []map[string]any) {
	t.Helper()
	s, err := adminv1.NewAdminClient(admin).SearchAudit(t.Context(), &adminv1.SearchAuditRequest{Events: []string{event}})
	if err != nil {
		t.Fatal(err)
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(r.Json, &m); err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
}

package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-id/signet/agent/internal/faultca"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

// adminOf is a client of the agent's admin socket.
func adminOf(t *testing.T, a *Agent) agentv1.AgentClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+a.AdminPath(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return agentv1.NewAgentClient(conn)
}

// TestStatusOnTheAdminSocket: contact and its loss are told with their times, and why.
func TestStatusOnTheAdminSocket(t *testing.T) {
	r := newRig(t)
	r.config.AdminSocket = AdminSocket{Path: filepath.Join(filepath.Dir(r.config.SocketPath), "m.sock"), AllowBesideSocket: true}
	began := time.Now()
	a, _ := r.run()
	r.ready(a)
	r.log.await(t, "in sync with the CA")
	admin := adminOf(t, a)
	status := func() *agentv1.GetStatusResponse {
		t.Helper()
		s, err := admin.GetStatus(t.Context(), &agentv1.GetStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := status()
	if s.GetState() != "in sync" || !s.GetCa().GetConnected() || s.GetCa().GetError() != "" || s.GetCa().GetSince().AsTime().Before(began) || s.GetNotReady() != "" ||
		s.GetId() != "spiffe://example.org"+faultca.AgentPath || s.GetRevision() != 1 || !s.GetServing() || s.GetAttestor() != "join_token" ||
		len(s.GetAttestors()) != 1 || s.GetAttestors()[0].GetName() != "unix" || s.GetSealedCache().GetKey() != "file" {
		t.Errorf("in contact: %v", s)
	}
	if strings.Contains(s.String(), "verysecret") {
		t.Error("the join token is in the status")
	}
	before := time.Now()
	r.ca.Stop()
	r.log.await(t, "no connection to the CA")
	if s = status(); s.GetState() != "connecting" || s.GetCa().GetConnected() || s.GetCa().GetSince().AsTime().Before(before) || s.GetCa().GetError() == "" || s.GetNotReady() != "" {
		t.Errorf("the CA is gone: %v", s)
	}
}

// TestNoPlaceForTheAdminSocket: at a place that nobody chose it is done without; at a chosen one it is an error.
func TestNoPlaceForTheAdminSocket(t *testing.T) {
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.config.AdminSocket = AdminSocket{Path: filepath.Join(file, "a.sock"), isDefault: true}
	a, stop := r.run()
	r.ready(a)
	r.log.await(t, "there is no admin socket")
	if a.AdminPath() != "" {
		t.Errorf("AdminPath is %q", a.AdminPath())
	}
	stop()
	r.config.AdminSocket.isDefault = false
	if _, err := New(r.config); err == nil || !strings.Contains(err.Error(), "admin_socket: ") {
		t.Errorf("New: %v, want an error that names admin_socket", err)
	}
}

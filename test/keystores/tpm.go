package keystores

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// A TPM is a software TPM that listens on a Unix socket.
type TPM struct {
	// URI names the TPM and the directory in which the driver keeps its wrapped keys.
	URI string
	// Socket is the TPM's socket, and Storage the directory.
	Socket, Storage string
	// EKRoots is a PEM file with the CA that has certified the endorsement key and the CA above it, of a CertifiedSWTPM.
	EKRoots string

	state string
	stop  func()
}

// SWTPM starts a TPM, which ends with the test.
func SWTPM(t testing.TB) *TPM {
	t.Helper()
	return newTPM(t, func(string) []string { return nil })
}

// CertifiedSWTPM starts a TPM whose endorsement keys a CA of its own has certified, as manufacturers do.
func CertifiedSWTPM(t testing.TB) *TPM {
	t.Helper()
	m := newTPM(t, func(dir string) []string {
		write := func(name, format string, args ...any) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, fmt.Appendf(nil, format, args...), 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}
		ca := write("ca.conf", "statedir = %[1]s\nsigningkey = %[1]s/signkey.pem\nissuercert = %[1]s/issuercert.pem\ncertserial = %[1]s/certserial\n", dir)
		config := write("setup.conf", "create_certs_tool = %s\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\n",
			program(t, "swtpm_localca", "swtpm-tools"), ca, write("options", "\n"))
		return []string{"--config", config, "--create-ek-cert"}
	})
	dir := filepath.Dir(m.Socket)
	var roots []byte
	for _, name := range []string{"issuercert.pem", "swtpm-localca-rootca-cert.pem"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, data...)
	}
	m.EKRoots = filepath.Join(dir, "ek-roots.pem")
	if err := os.WriteFile(m.EKRoots, roots, 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

func newTPM(t testing.TB, setupArgs func(dir string) []string) *TPM {
	t.Helper()
	// A Unix socket's path has about 100 bytes at most, so it is not under t.TempDir.
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &TPM{Socket: filepath.Join(dir, "tpm.sock"), Storage: filepath.Join(dir, "keys"), state: filepath.Join(dir, "state")}
	for _, d := range []string{m.Storage, m.state} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	setup := program(t, "swtpm_setup", "swtpm-tools")
	if out, err := exec.Command(setup, append([]string{"--tpm2", "--tpmstate", m.state, "--not-overwrite"}, setupArgs(dir)...)...).CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	m.URI = fmt.Sprintf("tpmkms:device=%s;storage-directory=%s", m.Socket, m.Storage)
	m.Start(t)
	t.Cleanup(func() { m.Stop(t) })
	return m
}

// Start starts the TPM's process again after Stop.
func (m *TPM) Start(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program(t, "swtpm", "swtpm"), "socket", "--tpm2", "--tpmstate", "dir="+m.state,
		"--server", "type=unixio,path="+m.Socket, "--ctrl", "type=unixio,path="+m.Socket+".ctrl", "--flags", "startup-clear,not-need-init")
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	m.stop = func() {
		cancel()
		_ = cmd.Wait() // killed
		m.stop = nil
	}
	// It listens on one after the other: the commands' may be there and not listen yet.
	deadline := time.Now().Add(20 * time.Second)
	for _, path := range []string{m.Socket + ".ctrl", m.Socket} {
		for {
			conn, err := net.Dial("unix", path)
			if err == nil {
				conn.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("swtpm does not listen: %v", err)
			}
			<-time.After(10 * time.Millisecond)
		}
	}
}

// Stop kills the TPM's process.
func (m *TPM) Stop(testing.TB) {
	if m.stop != nil {
		m.stop()
		os.Remove(m.Socket)
		os.Remove(m.Socket + ".ctrl")
	}
}

package brokerclient

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/internal/durable"
)

// ErrNothing says that there is nothing for the workload, not yet or not any more.
var ErrNothing = errors.New("there is nothing for this workload")

// A Memory is the Keeper of one workload's X.509 data for handshakes of this program on that workload's behalf: it is the
// source of its SVID and of its bundles. Another workload has another Memory; give the two sides of a connection each its
// own. [Broker API §4.2] It is safe for concurrent use.
type Memory struct {
	mu    sync.RWMutex
	state *X509 // nil: nothing
}

var (
	_ Keeper[X509]      = (*Memory)(nil)
	_ x509svid.Source   = (*Memory)(nil)
	_ x509bundle.Source = (*Memory)(nil)
)

// Take is a Keeper's.
func (m *Memory) Take(x X509) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = &x
	return nil
}

// Drop is a Keeper's.
func (m *Memory) Drop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = nil
}

// Get returns what there is, or ErrNothing.
func (m *Memory) Get() (X509, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.state == nil {
		return X509{}, ErrNothing
	}
	return *m.state, nil
}

// GetX509SVID returns the workload's default SVID, or ErrNothing.
func (m *Memory) GetX509SVID() (*x509svid.SVID, error) {
	x, err := m.Get()
	if err != nil {
		return nil, err
	}
	return x.Default(), nil
}

// GetX509BundleForTrustDomain returns a bundle that the workload may have; none of other workloads.
func (m *Memory) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	x, err := m.Get()
	if err != nil {
		return nil, err
	}
	return x.Bundles.GetX509BundleForTrustDomain(td)
}

// A Dir is the Keeper of one workload's X.509 data as PEM files, for programs that read files. The directory is the
// workload's alone. For the default identity they are svid.pem (the chain), svid.key and bundle.pem; for one with a hint
// also svid-HINT.pem and so on; for a federated trust domain bundle-federated-TRUSTDOMAIN.pem. Each file is replaced as a
// whole, and only the program's own user may read it.
type Dir string

var _ Keeper[X509] = Dir("")

// Take is a Keeper's. Files of what is not there any more are removed first.
func (d Dir) Take(x X509) error {
	files := map[string][]byte{}
	add := func(suffix string, svid *x509svid.SVID) error {
		chain, key, err := svid.Marshal()
		if err != nil {
			return fmt.Errorf("the SVID of %q: %w", svid.ID, err)
		}
		files["svid"+suffix+".pem"], files["svid"+suffix+".key"] = chain, key
		bundle, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
		if err != nil {
			return err
		}
		files["bundle"+suffix+".pem"] = certificates(bundle)
		return nil
	}
	own := map[spiffeid.TrustDomain]bool{}
	for i, svid := range x.SVIDs {
		own[svid.ID.TrustDomain()] = true
		if i == 0 {
			if err := add("", svid); err != nil {
				return err
			}
		}
		if svid.Hint == "" {
			continue
		}
		if !isFileName(svid.Hint) {
			return fmt.Errorf("the hint %.100q of %q cannot be in a file's name", svid.Hint, svid.ID)
		}
		if err := add("-"+svid.Hint, svid); err != nil {
			return err
		}
	}
	for _, bundle := range x.Bundles.Bundles() {
		if td := bundle.TrustDomain(); !own[td] {
			files["bundle-federated-"+td.Name()+".pem"] = certificates(bundle)
		}
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	if err := d.remove(func(name string) bool { return files[name] == nil }); err != nil {
		return err
	}
	// The chain comes last of its three: who sees it finds the rest.
	for _, last := range []bool{false, true} {
		for name, data := range files {
			if (strings.HasPrefix(name, "svid") && strings.HasSuffix(name, ".pem")) != last {
				continue
			}
			if err := durable.WriteFile(filepath.Join(string(d), name), data, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// Drop is a Keeper's: it removes the files, and the directory if nothing else is in it.
func (d Dir) Drop() {
	if d.remove(func(string) bool { return true }) == nil {
		os.Remove(string(d))
	}
}

// remove removes those of our files that drop names.
func (d Dir) remove(drop func(name string) bool) error {
	entries, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		ours := (strings.HasPrefix(name, "svid") || strings.HasPrefix(name, "bundle")) && (strings.HasSuffix(name, ".pem") || strings.HasSuffix(name, ".key"))
		if ours && drop(name) {
			errs = append(errs, os.Remove(filepath.Join(string(d), name)))
		}
	}
	return errors.Join(errs...)
}

func certificates(b *x509bundle.Bundle) []byte {
	var out []byte
	for _, c := range b.X509Authorities() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// isFileName says whether a hint, which the server chose, may be a part of a file's name.
func isFileName(s string) bool {
	if s == "" || len(s) > 100 || strings.HasPrefix(s, "federated-") {
		return false
	}
	return strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") == ""
}

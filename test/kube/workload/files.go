package main

import (
	"context"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// A source is where SVID and bundle come from.
type source interface {
	x509svid.Source
	x509bundle.Source
	io.Closer
}

// newSource returns the folder SVID_FILES, or the agent.
func newSource(ctx context.Context) (source, error) {
	if dir := os.Getenv("SVID_FILES"); dir != "" {
		return folder{dir: dir, last: &seen{}}, nil
	}
	return workloadapi.NewX509Source(ctx)
}

// A folder has credentials.pem and bundle.pem, as a kubelet keeps them in a volume.
type folder struct {
	dir  string
	last *seen
}

// seen is the serial number that was printed last.
type seen struct {
	mu     sync.Mutex
	serial *big.Int
}

func (f folder) GetX509SVID() (*x509svid.SVID, error) {
	data, err := os.ReadFile(filepath.Join(f.dir, "credentials.pem"))
	if err != nil {
		return nil, err
	}
	svid, err := x509svid.Parse(data, data)
	if err != nil {
		return nil, err
	}
	f.last.mu.Lock()
	defer f.last.mu.Unlock()
	if n := svid.Certificates[0].SerialNumber; f.last.serial == nil || f.last.serial.Cmp(n) != 0 {
		f.last.serial = n
		fmt.Printf("svid: %s %x\n", svid.ID.Path(), n)
	}
	return svid, nil
}

func (f folder) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.Load(td, filepath.Join(f.dir, "bundle.pem"))
}

func (folder) Close() error { return nil }

package nodeattest

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/signet-id/signet/internal/durable"
)

const (
	maxRootFileBytes = 4 << 20
	maxRootsInFile   = 1000
)

// RootFiles are files of PEM certificates that evidence must chain to. They are read again when they change, so that an
// operator can add and remove a CA while the CA runs.
type RootFiles struct {
	paths []string
	log   *slog.Logger

	mu    sync.Mutex // guards pool and seen
	pool  *x509.CertPool
	seen  []os.FileInfo
	whine string // the last thing that was logged, so that it is logged once
}

// NewRootFiles reads the files. An error names the file and what is wrong with it.
func NewRootFiles(paths []string, log *slog.Logger) (*RootFiles, error) {
	r := &RootFiles{paths: paths, log: log}
	if err := r.read(); err != nil {
		return nil, err
	}
	return r, nil
}

// Pool returns the certificates as the files have them now. While a file cannot be read, what it held before counts, and
// the log says so: half a write must not lock all nodes out.
func (r *RootFiles) Pool() (*x509.CertPool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.changed() {
		return r.pool, nil
	}
	if err := r.read(); err != nil {
		if text := err.Error(); text != r.whine {
			r.whine = text
			r.log.Error("roots of node attestation cannot be read; what they held before counts", "err", err)
		}
		return r.pool, nil
	}
	r.whine = ""
	r.log.Info("roots of node attestation are read again", "files", r.paths)
	return r.pool, nil
}

func (r *RootFiles) changed() bool {
	for i, p := range r.paths {
		info, err := os.Stat(p)
		if err != nil || !os.SameFile(info, r.seen[i]) || info.Size() != r.seen[i].Size() || !info.ModTime().Equal(r.seen[i].ModTime()) {
			return true
		}
	}
	return false
}

// read reads all files, or changes nothing.
func (r *RootFiles) read() error {
	pool := x509.NewCertPool()
	seen := make([]os.FileInfo, len(r.paths))
	for i, p := range r.paths {
		info, err := os.Stat(p) // before the contents: a change in between is seen the next time
		if err != nil {
			return err
		}
		seen[i] = info
		data, err := durable.ReadFile(p, maxRootFileBytes)
		if err != nil {
			return err
		}
		certs, err := ParseRoots(data)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		for _, c := range certs {
			pool.AddCert(c)
		}
	}
	r.pool, r.seen = pool, seen
	return nil
}

// ParseRoots reads certificates of CAs in PEM. At least one is needed.
func ParseRoots(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for n := 0; ; n++ {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %d is of type %q, not CERTIFICATE", n, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", n, err)
		}
		if c.BasicConstraintsValid && !c.IsCA {
			return nil, fmt.Errorf("certificate %d is not a CA's", n)
		}
		if len(certs) >= maxRootsInFile {
			return nil, fmt.Errorf("it has more than the %d certificates allowed", maxRootsInFile)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("it has no PEM certificate")
	}
	return certs, nil
}

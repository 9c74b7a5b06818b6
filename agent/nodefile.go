package agent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/spiffe"
)

const (
	// nodeFileVersion is the newest version of node.json that is understood.
	nodeFileVersion = 1
	// maxNodeFileBytes and maxBundleFileBytes bound what is read from disk.
	maxNodeFileBytes   = 4 << 20
	maxBundleFileBytes = 4 << 20
	maxAuthorities     = 1000
	maxChain           = 16
)

// A nodeRecord is what the agent is, and by what it verifies its CA. It never changes; a new one takes its place.
type nodeRecord struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
	// token is the fingerprint of the join token by which the agent came in; that token is of no more use.
	token string
	// reattestable says that the SVID is renewed by attesting again.
	reattestable bool
}

// A nodeFile is a nodeRecord on disk.
type nodeFile struct {
	Version      int      `json:"v"`
	TrustDomain  string   `json:"trust_domain"`
	Key          string   `json:"key"`         // PKCS#8, PEM
	Chain        [][]byte `json:"chain"`       // DER, leaf first
	Authorities  [][]byte `json:"authorities"` // DER
	Token        string   `json:"token,omitempty"`
	Reattestable bool     `json:"reattestable,omitempty"`
}

// A nodeDir keeps the record in the agent's data directory.
type nodeDir struct {
	path string
	td   spiffeid.TrustDomain
	lock *os.File

	unsaved *ecdsa.PrivateKey // the pending key while there is no room for it; guarded by node.attesting
}

// openNodeDir makes the directory if need be and keeps other agents out of it.
func openNodeDir(path string, td spiffeid.TrustDomain) (*nodeDir, error) {
	if err := durable.MkdirPrivate(path); err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	d := &nodeDir{path: path, td: td}
	var err error
	if d.lock, err = d.takeLock(); err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	if err := durable.CleanTemp(path); err != nil {
		return nil, errors.Join(fmt.Errorf("data_dir: %w", err), d.close())
	}
	return d, nil
}

func (d *nodeDir) close() error { return d.lock.Close() }

// DataDirInUse says whether an agent runs with data_dir. None is using one that does not exist. An agent of another trust domain
// is an error: its place is not to be taken.
func (c *Config) DataDirInUse() (bool, error) {
	d := &nodeDir{path: c.DataDir, td: c.trustDomain()}
	lock, err := os.OpenFile(filepath.Join(d.path, "lock"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("data_dir: %w", err)
	}
	defer lock.Close()
	// Shared, so that two that ask do not take each other for an agent.
	switch err := unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		var f struct {
			TrustDomain string `json:"trust_domain"`
		}
		data, err := durable.ReadSecret(d.recordPath(), maxNodeFileBytes)
		if err == nil && json.Unmarshal(data, &f) == nil && f.TrustDomain != "" && f.TrustDomain != d.td.Name() {
			return true, fmt.Errorf("data_dir: %q is in use by an agent of the trust domain %q; give this one, of %q, a data_dir and a socket_path of its own", d.path, f.TrustDomain, d.td.Name())
		}
		return true, nil
	case err != nil:
		return false, fmt.Errorf("data_dir: locking %s: %w", lock.Name(), err)
	}
	return false, nil
}

func (d *nodeDir) lockPath() string    { return filepath.Join(d.path, "lock") }
func (d *nodeDir) recordPath() string  { return filepath.Join(d.path, "node.json") }
func (d *nodeDir) sparePath() string   { return filepath.Join(d.path, "node.json.spare") }
func (d *nodeDir) pendingPath() string { return filepath.Join(d.path, "attest.key") }

// load returns the record, or nil if there is none. One that cannot be used is set aside, so that the agent can begin
// afresh and an operator can look at it; the error tells of it and does not stop the agent.
func (d *nodeDir) load() (*nodeRecord, error) {
	data, err := durable.ReadSecret(d.recordPath(), maxNodeFileBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var r *nodeRecord
	if err == nil {
		r, err = parseNodeFile(data, d.td)
	}
	if err != nil {
		aside := d.recordPath() + ".refused"
		if renameErr := os.Rename(d.recordPath(), aside); renameErr != nil {
			return nil, errors.Join(err, renameErr)
		}
		return nil, fmt.Errorf("%s is set aside as %s: %w", d.recordPath(), aside, err)
	}
	return r, nil
}

// save writes the record before it is used, so that a crash never leaves the agent with an SVID that the CA takes for
// the current one and the agent does not have.
func (d *nodeDir) save(r *nodeRecord) error {
	key, ok := r.svid.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return errors.New("the agent's key is not an EC key")
	}
	text, err := nodeattest.MarshalKey(key)
	if err != nil {
		return err
	}
	f := nodeFile{Version: nodeFileVersion, TrustDomain: d.td.Name(), Key: string(text), Token: r.token, Reattestable: r.reattestable}
	for _, c := range r.svid.Certificates {
		f.Chain = append(f.Chain, c.Raw)
	}
	for _, c := range r.bundle.X509Authorities() {
		f.Authorities = append(f.Authorities, c.Raw)
	}
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encoding the agent's record: %w", err)
	}
	return writeWithSpare(d.recordPath(), d.sparePath(), fillUp(data))
}

// pendingKey returns the key of an attestation that has not succeeded yet, and makes it the first time. It is on disk
// before the CA sees it: if the reply gets lost, the same key gets in again. With inMemory it may be in memory alone if the
// disk is full; what is spent with the key must not depend on that.
func (d *nodeDir) pendingKey(inMemory bool) (*ecdsa.PrivateKey, error) {
	text, err := durable.ReadSecret(d.pendingPath(), nodeattest.MaxKeyBytes)
	if err == nil {
		if key, err := nodeattest.ParseKey(text); err == nil {
			return key, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key := d.unsaved
	if key == nil {
		if key, err = nodeattest.NewKey(); err != nil {
			return nil, err
		}
	}
	if text, err = nodeattest.MarshalKey(key); err != nil {
		return nil, err
	}
	if err := durable.WriteFile(d.pendingPath(), text, 0o600); err != nil {
		if !inMemory || !noRoom(err) {
			return nil, err
		}
		d.unsaved = key
	}
	return key, nil
}

// dropPendingKey forgets it after the record that holds it was saved.
func (d *nodeDir) dropPendingKey() error {
	d.unsaved = nil
	return durable.Remove(d.pendingPath())
}

// parseNodeFile reads what save wrote. The error never repeats the key.
func parseNodeFile(data []byte, td spiffeid.TrustDomain) (*nodeRecord, error) {
	if len(data) > maxNodeFileBytes {
		return nil, fmt.Errorf("it has %d bytes, more than the %d allowed", len(data), maxNodeFileBytes)
	}
	var f nodeFile
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, errors.New("it is not the JSON that the agent writes")
	}
	switch {
	case f.Version != nodeFileVersion:
		return nil, fmt.Errorf("it has format version %d, this agent reads %d", f.Version, nodeFileVersion)
	case f.TrustDomain != td.Name():
		return nil, fmt.Errorf("it is of trust domain %q, and trust_domain is %q", f.TrustDomain, td.Name())
	}
	key, err := nodeattest.ParseKey([]byte(f.Key))
	if err != nil {
		return nil, err
	}
	svid, err := readAgentSVID(td, f.Chain, key)
	if err != nil {
		return nil, err
	}
	if len(f.Authorities) > maxAuthorities {
		return nil, fmt.Errorf("it has %d authorities, more than the %d allowed", len(f.Authorities), maxAuthorities)
	}
	bundle := x509bundle.New(td)
	for i, der := range f.Authorities {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("authority %d: %w", i, err)
		}
		bundle.AddX509Authority(c)
	}
	if bundle.Empty() {
		return nil, errors.New("it has no X.509 authority")
	}
	return &nodeRecord{svid: svid, bundle: bundle, token: f.Token, reattestable: f.Reattestable}, nil
}

// readAgentSVID checks that the chain is an agent's X509-SVID of td for key.
func readAgentSVID(td spiffeid.TrustDomain, chain [][]byte, key *ecdsa.PrivateKey) (*x509svid.SVID, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("the agent's SVID has %d certificates, not 1 to %d", len(chain), maxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the agent's SVID: %w", i, err)
		}
		certs[i] = c
	}
	id, err := spiffe.CheckX509SVIDLeaf(certs[0])
	switch {
	case err != nil:
		return nil, fmt.Errorf("the agent's SVID: %w", err)
	case !id.MemberOf(td):
		return nil, fmt.Errorf("the agent's SVID is for %q, which is not in trust domain %q", id, td.Name())
	case !key.PublicKey.Equal(certs[0].PublicKey):
		return nil, errors.New("the agent's SVID is for another key")
	}
	return &x509svid.SVID{ID: id, Certificates: certs, PrivateKey: key}, nil
}

// parseBundleFile reads the authorities of td from PEM certificates or a SPIFFE bundle document.
func parseBundleFile(td spiffeid.TrustDomain, data []byte) (*x509bundle.Bundle, error) {
	if len(data) > maxBundleFileBytes {
		return nil, fmt.Errorf("it has %d bytes, more than the %d allowed", len(data), maxBundleFileBytes)
	}
	if trimmed := bytes.TrimSpace(data); len(trimmed) > 0 && trimmed[0] == '{' {
		b, _, err := spiffe.ParseBundle(td, trimmed)
		if err != nil {
			return nil, err
		}
		if len(b.X509Authorities()) == 0 {
			return nil, errors.New("it has no X.509 authority")
		}
		return b.X509Bundle(), nil
	}
	bundle := x509bundle.New(td)
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
		if !c.IsCA {
			return nil, fmt.Errorf("certificate %d is not a CA's; the file must hold the authorities of the trust domain", n)
		}
		if n >= maxAuthorities {
			return nil, fmt.Errorf("it has more than the %d authorities allowed", maxAuthorities)
		}
		bundle.AddX509Authority(c)
	}
	if bundle.Empty() {
		return nil, errors.New("it has neither a PEM certificate nor a SPIFFE bundle")
	}
	return bundle, nil
}

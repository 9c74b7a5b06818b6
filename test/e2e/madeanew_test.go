package e2e

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// TestCAMadeAnew takes the CA away for good and puts one with other authorities in its place. A node is back as soon as the
// operator has given it what verifies the new one: a fresh join token, or the new authorities in trust_bundle_path. It
// waits neither for its SVID to end nor for its renewal, and what it kept of the old CA does not stand in its way.
func TestCAMadeAnew(t *testing.T) {
	for _, by := range []string{"join_token", "x509pop"} {
		for _, restarted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, agent restarted %t", by, restarted), func(t *testing.T) {
				t.Parallel()
				ctx := bounded(t, 60*time.Second)
				f := newFleet(t)
				give := func() { f.configureAgent(ctx, f.addr) } // a fresh token in the same file
				if by == "x509pop" {
					root, leaf, key := nodePKI(t, f.dir)
					config, err := os.ReadFile(f.dir + "/ca.yaml")
					if err != nil {
						t.Fatal(err)
					}
					f.write("ca.yaml", string(config)+fmt.Sprintf("node_attestors: {x509pop: {ca_bundle_path: %s}}\n", root))
					f.write("agent.yaml", fmt.Sprintf("trust_domain: example.org\nserver_address: %s\ndata_dir: %s/agent\nsocket_path: %s/agent.sock\ntrust_bundle_path: %s/bundle.pem\n"+
						"node_attestation: {x509pop: {certificate_path: %s, private_key_path: %s}}\n", f.addr, f.dir, f.dir, f.dir, leaf, key))
					give = func() { f.write("bundle.pem", string(f.authorities(ctx))) }
				}
				f.ca.start()
				give()
				f.agent.start()
				f.apply(ctx, identity("old"))
				f.await(ctx, "/old")
				before := f.authorities(ctx)

				f.ca.end(syscall.SIGKILL)
				for _, name := range []string{"ca", "ca.sock", "seal.key"} {
					if err := os.RemoveAll(f.dir + "/" + name); err != nil {
						t.Fatal(err)
					}
				}
				if restarted {
					f.agent.end(syscall.SIGTERM)
					f.agent.start()
					f.await(ctx, "/old") // from the sealed cache
				}
				f.ca.start()
				give()
				if bytes.Equal(before, f.authorities(ctx)) {
					t.Fatal("the CA has its old authorities")
				}
				f.agent.cmd.Process.Signal(syscall.SIGHUP) // so that it looks now
				f.apply(ctx, identity("new"))
				f.await(ctx, "/new")
				svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(f.endpoint()))
				if err != nil || svid.ID.Path() != "/new" {
					t.Errorf("the caller's SVID is %v (%v); what the old CA had said counts no more", svid, err)
				}
			})
		}
	}
}

// authorities are the CA's, in PEM.
func (f *fleet) authorities(ctx context.Context) []byte {
	f.t.Helper()
	var b *types.Bundle
	if err := eventually(ctx, func() (err error) {
		b, err = bundlev1.NewBundleClient(f.admin).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
	var out []byte
	for _, a := range b.GetX509Authorities() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.GetAsn1()})...)
	}
	return out
}

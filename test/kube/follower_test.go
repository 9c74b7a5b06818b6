//go:build kube

package kube

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// agentToken makes a pod of the service account agent on a node and returns a token of it, as a kubelet would mount it.
func (k *cluster) agentToken(name, node string) string {
	k.t.Helper()
	p := simulatedPod(k.namespace, name, node)
	p.Labels = map[string]string{"app": "signet-agent"}
	p.Spec.ServiceAccountName = "agent"
	made, err := k.admin().CoreV1().Pods(k.namespace).Create(k.ctx, p, metav1.CreateOptions{})
	if err != nil {
		k.t.Fatal(err)
	}
	made.Status.Phase, made.Status.HostIP, made.Status.HostIPs = corev1.PodRunning, "192.0.2.1", []corev1.HostIP{{IP: "192.0.2.1"}}
	if made, err = k.admin().CoreV1().Pods(k.namespace).UpdateStatus(k.ctx, made, metav1.UpdateOptions{}); err != nil { // as a kubelet says
		k.t.Fatal(err)
	}
	return k.tokenOf(made)
}

func (k *cluster) tokenOf(p *corev1.Pod) string {
	return k.create("agent", "--bound-object-kind=Pod", "--bound-object-name="+p.Name, "--bound-object-uid="+string(p.UID), "--audience=spire-server")
}

// A follower is what the agent of one node is told by the CA over its port, and keeps.
type follower struct {
	t    *testing.T
	path string // of the agent's SPIFFE ID

	mu      sync.Mutex
	held    map[string]*nodev1.Entry // by id
	told    bytes.Buffer             // all that was ever sent
	unknown []string                 // beginnings of ids that it was told to keep
	whole   bool                     // a snapshot was complete
	ended   error
	changed chan struct{}
}

// attested attests as the node that a token is of, and returns the credentials for calls as its agent.
func attested(t *testing.T, ctx context.Context, address, token string, roots []*x509.Certificate) (string, *grpc.ClientConn) {
	t.Helper()
	key, err := nodeattest.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	bundle := x509bundle.FromX509Authorities(td, roots)
	got, err := caclient.Attest(ctx, caclient.Attestation{Address: address, TrustDomain: td, CSR: csr, Bundle: bundle,
		Evidence: nodeattest.Shown{Attestor: "k8s_psat", Bytes: fmt.Appendf(nil, `{"cluster":"prod","token":%q}`, token)}})
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range got.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	creds := credentials.NewTLS(tlsconfig.MTLSClientConfig(&x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle, tlsconfig.AuthorizeMemberOf(td)))
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return id.Path(), conn
}

// follow follows the CA as the agent of the node that a token is of, by a stream of its own.
func follow(t *testing.T, ctx context.Context, address, token string, roots []*x509.Certificate) *follower {
	t.Helper()
	path, conn := attested(t, ctx, address, token, roots)
	f := &follower{t: t, path: path, held: map[string]*nodev1.Entry{}, changed: make(chan struct{})}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.do(func() { f.ended = f.run(ctx, nodev1.NewNodeClient(conn)) })
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return f
}

func (f *follower) do(g func()) {
	g()
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.changed)
	f.changed = make(chan struct{})
}

// run receives until the stream ends.
func (f *follower) run(ctx context.Context, client nodev1.NodeClient) error {
	stream, err := client.Follow(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1}}}); err != nil {
		return err
	}
	var named map[string]*nodev1.Entry // by the snapshot that is under way
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		raw, err := proto.Marshal(m)
		if err != nil {
			return err
		}
		f.do(func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.told.Write(raw)
			into := f.held
			if m.Snapshot {
				if named == nil {
					named = map[string]*nodev1.Entry{}
				}
				into = named
			}
			for _, e := range m.Entries {
				into[e.Id] = e
			}
			for _, id := range m.RemovedEntryIds {
				delete(into, id)
			}
			if m.Snapshot && m.Complete {
				f.unknown = m.UnknownEntryPrefixes
				for id, e := range f.held {
					if slices.ContainsFunc(f.unknown, func(p string) bool { return strings.HasPrefix(id, p) }) {
						named[id] = e
					}
				}
				f.held, named, f.whole = named, nil, true
			}
		})
		if err := stream.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Ack_{Ack: &nodev1.FollowRequest_Ack{Revision: m.To}}}); err != nil {
			return err
		}
	}
}

// ids are the SPIFFE IDs that it holds, in order. mu is held.
func (f *follower) ids() (out []string) {
	for _, e := range f.held {
		out = append(out, strings.TrimPrefix(e.SpiffeId, "spiffe://example.org"))
	}
	slices.Sort(out)
	return out
}

// until waits until it holds certain SPIFFE IDs, and no others.
func (f *follower) until(ctx context.Context, what string, want ...string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	slices.Sort(want)
	for {
		f.mu.Lock()
		have, changed, ended := f.ids(), f.changed, f.ended
		ok := f.whole && slices.Equal(have, want)
		f.mu.Unlock()
		if ok {
			return
		}
		if ended != nil {
			f.t.Fatalf("waiting until %s: the stream ended: %v", what, ended)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			f.t.Fatalf("it never comes that %s: %d IDs are held, %d wanted (snapshot whole: %t, stream: %v); missing %.1000q, too many %.1000q", what, len(have), len(want), f.whole, f.ended, without(want, have), without(have, want))
		}
	}
}

// without returns what is in a and not in b.
func without(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

// was returns all that it was ever sent.
func (f *follower) was() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return bytes.Clone(f.told.Bytes())
}

package broker_test

import (
	"context"
	"crypto/tls"
	"maps"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

func TestMain(m *testing.M) {
	if os.Getenv(brokertest.ChildEnv) != "" {
		os.Exit(brokertest.Child())
	}
	goleak.VerifyTestMain(m)
}

// clientTLS is TLS with the SVID as it is now, and without looking at the server.
func clientTLS(svid func() *x509svid.SVID) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		s := svid()
		if s == nil {
			return &tls.Certificate{}, nil
		}
		cert := &tls.Certificate{PrivateKey: s.PrivateKey}
		for _, c := range s.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		return cert, nil
	}}
}

func always(svid *x509svid.SVID) func() *x509svid.SVID { return func() *x509svid.SVID { return svid } }

// dial connects to a target with TLS.
func dial(t testing.TB, target string, config *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// as connects to the Unix socket with an SVID for the path.
func as(t testing.TB, e *brokertest.Endpoint, a *brokertest.Authority, path string) brokerpb.APIClient {
	t.Helper()
	return brokerpb.NewAPIClient(dial(t, "unix:"+e.Path, clientTLS(always(a.SVID(t, path, time.Hour)))))
}

// asBroker is as for the one that is listed.
func asBroker(t testing.TB, e *brokertest.Endpoint, a *brokertest.Authority) brokerpb.APIClient {
	return as(t, e, a, brokertest.BrokerPath)
}

// ctx has a limit that only a hanging test meets, and the header.
func header(t testing.TB) context.Context {
	t.Helper()
	return metadata.AppendToOutgoingContext(plain(t), "broker.spiffe.io", "true")
}

func plain(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func pack(t testing.TB, m proto.Message) *brokerpb.WorkloadReference {
	t.Helper()
	packed, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &brokerpb.WorkloadReference{Reference: packed}
}

func pidRef(t testing.TB, pid int32) *brokerpb.WorkloadReference {
	return pack(t, &brokerpb.WorkloadPIDReference{Pid: pid})
}

func podRef(t testing.TB, namespace, name, uid string) *brokerpb.WorkloadReference {
	ref := &brokerpb.KubernetesObjectReference{Type: &brokerpb.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: uid}
	if name != "" {
		ref.Key = &brokerpb.KubernetesObjectKey{Namespace: namespace, Name: name}
	}
	return pack(t, ref)
}

// calls are all RPCs for a reference, as a plain call that returns the first answer's error.
func calls(t testing.TB, c brokerpb.APIClient, ref *brokerpb.WorkloadReference) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"SubscribeToX509SVID": func(ctx context.Context) error {
			return first(c.SubscribeToX509SVID(ctx, &brokerpb.SubscribeToX509SVIDRequest{Reference: ref}))
		},
		"SubscribeToX509Bundles": func(ctx context.Context) error {
			return first(c.SubscribeToX509Bundles(ctx, &brokerpb.SubscribeToX509BundlesRequest{Reference: ref}))
		},
		"SubscribeToJWTBundles": func(ctx context.Context) error {
			return first(c.SubscribeToJWTBundles(ctx, &brokerpb.SubscribeToJWTBundlesRequest{Reference: ref}))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := c.FetchJWTSVID(ctx, &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"a"}})
			return err
		},
	}
}

func first[M any](stream grpc.ServerStreamingClient[M], err error) error {
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

func recv[M any](t testing.TB, stream grpc.ServerStreamingClient[M]) *M {
	t.Helper()
	m, err := stream.Recv()
	if err != nil {
		t.Fatalf("the stream ended: %v", err)
	}
	return m
}

// subscribe opens a stream of X509-SVIDs and returns it with its first message.
func subscribe(t testing.TB, c brokerpb.APIClient, ref *brokerpb.WorkloadReference) (grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse], *brokerpb.SubscribeToX509SVIDResponse) {
	t.Helper()
	stream, err := c.SubscribeToX509SVID(header(t), &brokerpb.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	return stream, recv(t, stream)
}

// ended waits for the stream's end and returns why.
func ended[M any](stream grpc.ServerStreamingClient[M]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

func ids(m *brokerpb.SubscribeToX509SVIDResponse) string {
	var all []string
	for _, s := range m.Svids {
		all = append(all, strings.TrimPrefix(s.SpiffeId, "spiffe://example.org"))
	}
	return strings.Join(all, " ")
}

func wantCode(t testing.TB, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Fatalf("status %v (%v), want %v", status.Code(err), err, want)
	}
	for _, w := range words {
		if !strings.Contains(status.Convert(err).Message(), w) {
			t.Errorf("message %q does not say %q", status.Convert(err).Message(), w)
		}
	}
}

// wantInfo checks the ErrorInfo of the standard. metadata are those entries that must be there.
func wantInfo(t testing.TB, err error, code codes.Code, reason string, metadata map[string]string) {
	t.Helper()
	wantCode(t, err, code)
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "spiffe.io" {
			if info.Reason != reason {
				t.Errorf("reason %q (%v), want %q", info.Reason, err, reason)
			}
			have := map[string]string{}
			for k := range metadata {
				have[k] = info.Metadata[k]
			}
			if !maps.Equal(have, metadata) {
				t.Errorf("metadata %v, want %v", info.Metadata, metadata)
			}
			return
		}
	}
	t.Errorf("%v has no ErrorInfo of spiffe.io, want the reason %s", err, reason)
}

// selector is what brokertest.ByPID says of a process.
func selector(w *brokertest.Workload) string { return "test:pid:" + itoa(w.PID) }

// farAway takes connections of the loopback interface for ones of another host.
type farAway struct{ net.Listener }

func (f farAway) Accept() (net.Conn, error) {
	c, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return farConn{c}, nil
}

type farConn struct{ net.Conn }

func (farConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4711} }

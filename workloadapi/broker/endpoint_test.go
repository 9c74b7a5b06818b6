package broker_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/signet-id/signet/workloadapi/broker"
	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

func itoa(n int32) string { return strconv.Itoa(int(n)) }

// oneWorkload has an endpoint and a process that is entitled to /web.
func oneWorkload(t testing.TB, adjust ...func(*broker.Config)) (*brokertest.Authority, *brokertest.Source, *brokertest.Endpoint, *brokertest.Workload) {
	t.Helper()
	a := brokertest.NewAuthority(t, "example.org")
	w := brokertest.Start(t)
	src := brokertest.NewSource(a, brokertest.Entry{Selector: selector(w), Identity: a.Identity(t, "/web")})
	return a, src, brokertest.Serve(t, src, adjust...), w
}

func TestBEP_02_UnixSocketAndTCP(t *testing.T) {
	a, _, e, w := oneWorkload(t, func(c *broker.Config) { c.Brokers[0].PIDOverLoopback = true })
	for _, target := range []string{"unix:" + e.Path, e.TCP.String()} {
		c := brokerpb.NewAPIClient(dial(t, target, clientTLS(always(a.SVID(t, brokertest.BrokerPath, time.Hour)))))
		for name, call := range calls(t, c, pidRef(t, w.PID)) {
			if err := call(header(t)); err != nil {
				t.Errorf("%s over %s = %v", name, target, err)
			}
		}
	}
}

// TestBEP_03_V148_SecurityHeader: every call without exactly the header is refused, whatever it calls.
func TestBEP_03_V148_SecurityHeader(t *testing.T) {
	a, _, e, w := oneWorkload(t)
	conn := dial(t, "unix:"+e.Path, clientTLS(always(a.SVID(t, brokertest.BrokerPath, time.Hour))))
	all := calls(t, brokerpb.NewAPIClient(conn), pidRef(t, w.PID))
	all["reflection"] = func(ctx context.Context) error {
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	all["no such method"] = func(ctx context.Context) error {
		return conn.Invoke(ctx, "/spiffe.broker.API/FetchEverything", &brokerpb.FetchJWTSVIDRequest{}, &brokerpb.FetchJWTSVIDResponse{})
	}
	all["no such service"] = func(ctx context.Context) error {
		return conn.Invoke(ctx, "/SpiffeWorkloadAPI/FetchJWTSVID", &brokerpb.FetchJWTSVIDRequest{}, &brokerpb.FetchJWTSVIDResponse{})
	}
	for _, kv := range [][]string{
		nil, {"broker.spiffe.io", "True"}, {"broker.spiffe.io", "TRUE"}, {"broker.spiffe.io", "1"}, {"broker.spiffe.io", ""}, {"broker.spiffe.io", "true,false"},
		{"broker.spiffe.io", "true", "broker.spiffe.io", "true"}, {"broker.spiffe.io", "true", "broker.spiffe.io", "false"}, {"workload.spiffe.io", "true"},
	} {
		for name, call := range all {
			t.Run(fmt.Sprintf("%s with %q", name, kv), func(t *testing.T) {
				wantCode(t, call(metadata.AppendToOutgoingContext(plain(t), kv...)), codes.InvalidArgument, "broker.spiffe.io")
			})
		}
	}
	// The case of the key does not matter in HTTP/2.
	if err := all["FetchJWTSVID"](metadata.AppendToOutgoingContext(plain(t), "Broker.Spiffe.IO", "true")); err != nil {
		t.Errorf("with the header: %v", err)
	}
}

// TestBEP_04_MutualTLS: on the Unix socket as on TCP, nobody gets in without TLS of a good version and a valid X509-SVID.
func TestBEP_04_MutualTLS(t *testing.T) {
	a, _, e, w := oneWorkload(t, func(c *broker.Config) { c.Brokers[0].PIDOverLoopback = true })
	other, impostor := brokertest.NewAuthority(t, "other.example"), brokertest.NewAuthority(t, "example.org")
	good := a.SVID(t, brokertest.BrokerPath, time.Hour)
	stolen := *good
	stolen.PrivateKey = a.SVID(t, brokertest.BrokerPath, time.Hour).PrivateKey
	version := func(config *tls.Config, v uint16) *tls.Config {
		config.MinVersion, config.MaxVersion = v, v
		return config
	}
	targets := map[string]string{"unix": "unix:" + e.Path, "tcp": e.TCP.String()}
	for kind, target := range targets {
		for name, config := range map[string]*tls.Config{
			"no certificate":               clientTLS(always(nil)),
			"an ended SVID":                clientTLS(always(a.SVID(t, brokertest.BrokerPath, -time.Second))),
			"another trust domain":         clientTLS(always(other.SVID(t, brokertest.BrokerPath, time.Hour))),
			"another authority, same name": clientTLS(always(impostor.SVID(t, brokertest.BrokerPath, time.Hour))),
			"an SVID without its key":      clientTLS(always(&stolen)),
			"TLS 1.1":                      version(clientTLS(always(good)), tls.VersionTLS11),
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				c := brokerpb.NewAPIClient(dial(t, target, config))
				wantCode(t, calls(t, c, pidRef(t, w.PID))["FetchJWTSVID"](header(t)), codes.Unavailable)
			})
		}
		t.Run(kind+" plaintext", func(t *testing.T) {
			conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			wantCode(t, calls(t, brokerpb.NewAPIClient(conn), pidRef(t, w.PID))["FetchJWTSVID"](header(t)), codes.Unavailable)
		})
		for name, v := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
			t.Run(kind+" "+name, func(t *testing.T) {
				c := brokerpb.NewAPIClient(dial(t, target, version(clientTLS(always(good)), v)))
				if err := calls(t, c, pidRef(t, w.PID))["FetchJWTSVID"](header(t)); err != nil {
					t.Errorf("with %s: %v", name, err)
				}
			})
		}
	}
}

// TestBEP_05_BothSidesRotate: renewed SVIDs of both sides are used by the next handshake, and the connection that is open
// goes on.
func TestBEP_05_BothSidesRotate(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	var seen atomic.Pointer[string]
	var own atomic.Pointer[x509svid.SVID]
	own.Store(a.SVID(t, brokertest.BrokerPath, time.Hour))
	config := clientTLS(own.Load)
	config.VerifyConnection = func(s tls.ConnectionState) error {
		serial := s.PeerCertificates[0].SerialNumber.String()
		seen.Store(&serial)
		return nil
	}
	stream, _ := subscribe(t, brokerpb.NewAPIClient(dial(t, "unix:"+e.Path, config)), pidRef(t, w.PID))
	before := *seen.Load()

	own.Store(a.SVID(t, brokertest.BrokerPath, time.Hour))
	renewed := a.SVID(t, brokertest.ServerPath, time.Hour)
	e.Server.Store(renewed)
	src.Change(func() { src.Entries[0].Identity = a.Identity(t, "/web") })
	if m := recv(t, stream); ids(m) != "/web" {
		t.Errorf("the open stream brings %q after the rotation", ids(m))
	}
	subscribe(t, brokerpb.NewAPIClient(dial(t, "unix:"+e.Path, config)), pidRef(t, w.PID))
	if after := *seen.Load(); after == before || after != renewed.Certificates[0].SerialNumber.String() {
		t.Errorf("a new handshake shows the SVID %s, before %s; want the renewed one", after, before)
	}
}

// TestBEP_09_BEP_11_BAPI_21_OnlyListedBrokers: a valid SVID of the trust domain opens nothing by itself.
func TestBEP_09_BEP_11_BAPI_21_OnlyListedBrokers(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	for _, path := range []string{"/web", "/broker/x", "/Broker", "/other", brokertest.ServerPath} {
		conn := dial(t, "unix:"+e.Path, clientTLS(always(a.SVID(t, path, time.Hour))))
		for name, call := range calls(t, brokerpb.NewAPIClient(conn), pidRef(t, w.PID)) {
			t.Run(path+" "+name, func(t *testing.T) { wantCode(t, call(header(t)), codes.PermissionDenied, "not a broker") })
		}
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(header(t))
		if err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, err, codes.PermissionDenied, "not a broker")
	}
	src.Look(func() {
		if len(src.Seen) > 0 {
			t.Errorf("the source was asked about %d callers for brokers that are none", len(src.Seen))
		}
	})
}

// TestBEP_11_EndedSVIDIsUnauthenticated: the SVID that a connection was opened with ends while it is open. Calls get
// Unauthenticated, and a stream gets nothing more.
func TestBEP_11_EndedSVIDIsUnauthenticated(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	c := asBroker(t, e, a)
	stream, _ := subscribe(t, c, pidRef(t, w.PID))
	e.Clock.Advance(2 * time.Hour)
	for name, call := range calls(t, c, pidRef(t, w.PID)) {
		t.Run(name, func(t *testing.T) { wantCode(t, call(header(t)), codes.Unauthenticated, "connect anew") })
	}
	src.Change(func() { src.Entries[0].Identity = a.Identity(t, "/web") })
	wantCode(t, ended(stream), codes.Unauthenticated)
}

// TestBEP_15_BEP_16_BAPI_02_ServicesAreTheStandards: the Broker API is there as the standard has it, with reflection, and
// nothing was added to it.
func TestBEP_15_BEP_16_BAPI_02_ServicesAreTheStandards(t *testing.T) {
	a, _, e, _ := oneWorkload(t)
	conn := dial(t, "unix:"+e.Path, clientTLS(always(a.SVID(t, brokertest.BrokerPath, time.Hour))))
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(header(t))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(req *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		t.Helper()
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	list := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	var services []string
	for _, s := range list.GetListServicesResponse().Service {
		services = append(services, s.Name)
	}
	if want := []string{"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection", "spiffe.broker.API"}; !slices.Equal(services, want) {
		t.Errorf("services are %q, want %q", services, want)
	}
	file := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "spiffe.broker.API"}})
	var have descriptorpb.FileDescriptorProto
	found := false
	for _, raw := range file.GetFileDescriptorResponse().GetFileDescriptorProto() {
		if err := proto.Unmarshal(raw, &have); err != nil {
			t.Fatal(err)
		}
		if have.GetPackage() == "spiffe.broker" {
			found = true
			break
		}
	}
	var methods []string
	for _, s := range have.Service {
		for _, m := range s.Method {
			methods = append(methods, m.GetName())
		}
	}
	want := []string{"SubscribeToX509SVID", "SubscribeToX509Bundles", "FetchJWTSVID", "SubscribeToJWTBundles"}
	if !found || !slices.Equal(methods, want) {
		t.Errorf("the API has the methods %q, want %q", methods, want)
	}
	if spec := protodesc.ToFileDescriptorProto(brokerpb.File_api_proto); !proto.Equal(&have, spec) {
		t.Error("the API's description is not that of the standard's definitions")
	}
	stream.CloseSend()
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("reflection ends with %v", err)
	}
}

// TestStreamsAreBounded: a broker at its bound is told to come back, and others are not touched by that.
func TestStreamsAreBounded(t *testing.T) {
	a, _, e, w := oneWorkload(t, func(c *broker.Config) {
		second := c.Brokers[0]
		second.ID = brokertest.NewAuthority(t, "example.org").SVID(t, "/second", time.Hour).ID
		c.Brokers = append(c.Brokers, second)
		c.MaxStreams = 3
	})
	config := clientTLS(always(a.SVID(t, brokertest.BrokerPath, time.Hour)))
	for range 3 { // a connection each: what counts is the broker
		subscribe(t, brokerpb.NewAPIClient(dial(t, "unix:"+e.Path, config)), pidRef(t, w.PID))
	}
	c := brokerpb.NewAPIClient(dial(t, "unix:"+e.Path, config))
	wantCode(t, calls(t, c, pidRef(t, w.PID))["SubscribeToX509SVID"](header(t)), codes.Unavailable, "too many calls")
	subscribe(t, as(t, e, a, "/second"), pidRef(t, w.PID))
}

// TestStrangersDoNotFillTheEndpoint: workloads that are no brokers have a few places to be told so, and a broker gets in
// while they hold them.
func TestStrangersDoNotFillTheEndpoint(t *testing.T) {
	a, _, e, w := oneWorkload(t)
	told, refused := 0, 0
	for i := range 20 {
		c := as(t, e, a, "/stranger-"+strconv.Itoa(i)) // its connection stays open
		switch err := calls(t, c, pidRef(t, w.PID))["FetchJWTSVID"](header(t)); statusCode(err) {
		case codes.PermissionDenied:
			told++
		case codes.Unavailable:
			refused++
		default:
			t.Errorf("a stranger gets %v", err)
		}
	}
	if told == 0 || told > 8 || told+refused != 20 {
		t.Errorf("%d strangers were told and %d refused, want at most 8 told", told, refused)
	}
	subscribe(t, asBroker(t, e, a), pidRef(t, w.PID))
}

// TestConnectionsAreBounded: connections that say nothing do not pile up beyond the bound.
func TestConnectionsAreBounded(t *testing.T) {
	_, _, e, _ := oneWorkload(t)
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range 512 {
		c, err := net.Dial("unix", e.Path)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	c, err := net.Dial("unix", e.Path)
	if err != nil {
		t.Fatal(err)
	}
	open = append(open, c)
	c.SetReadDeadline(time.Now().Add(5 * time.Second)) // the handshake's own limit is longer
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("reading from connection 513: %v, want that it is closed", err)
	}
}

// TestStopTellsBrokersToComeBack: at shutdown streams end with Unavailable, and the endpoint with its context.
func TestStopTellsBrokersToComeBack(t *testing.T) {
	a, _, e, w := oneWorkload(t)
	stream, _ := subscribe(t, asBroker(t, e, a), pidRef(t, w.PID))
	e.Stop()
	wantCode(t, ended(stream), codes.Unavailable)
}

func TestNewRefuses(t *testing.T) {
	a := brokertest.NewAuthority(t, "example.org")
	id := a.SVID(t, "/b", time.Hour).ID
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	good := func() broker.Config {
		return broker.Config{TrustDomain: a.TD, Source: brokertest.NewSource(a), Attestor: brokertest.ByPID{}, SVID: always(nil), Bundles: a.Bundle(),
			Listeners: []net.Listener{l}, Brokers: []broker.Broker{{ID: id, References: []broker.ReferenceType{broker.PID}}}}
	}
	for name, change := range map[string]func(*broker.Config){
		"no source":         func(c *broker.Config) { c.Source = nil },
		"no listener":       func(c *broker.Config) { c.Listeners = nil },
		"no broker":         func(c *broker.Config) { c.Brokers = nil },
		"no references":     func(c *broker.Config) { c.Brokers[0].References = nil },
		"unknown reference": func(c *broker.Config) { c.Brokers[0].References = []broker.ReferenceType{"name"} },
		"twice":             func(c *broker.Config) { c.Brokers = append(c.Brokers, c.Brokers[0]) },
		"other domain": func(c *broker.Config) {
			c.Brokers[0].ID = brokertest.NewAuthority(t, "o.example").SVID(t, "/b", time.Hour).ID
		},
		"negative": func(c *broker.Config) { c.MaxStreams = -1 },
	} {
		c := good()
		change(&c)
		if e, err := broker.New(c); err == nil {
			e.Close()
			t.Errorf("%s: New takes it", name)
		}
	}
}

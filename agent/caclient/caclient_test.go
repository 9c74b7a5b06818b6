package caclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/internal/faultca"
	"github.com/signet-id/signet/agent/nodeattest"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

func TestFollowAppliesAndAcknowledges(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	acks := make(chan *nodev1.FollowRequest_Ack, 100)
	push := make(chan *nodev1.FollowResponse)
	ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		hello, err := s.Recv()
		if err != nil {
			return err
		}
		if h := hello.GetHello(); h.GetFormat() != Format || h.GetRevision() != 0 || h.GetEpoch() != "" {
			return status.Errorf(codes.InvalidArgument, "hello %v", h)
		}
		received := make(chan *nodev1.FollowRequest)
		go func() {
			defer close(received)
			for {
				m, err := s.Recv()
				if err != nil {
					return
				}
				received <- m
			}
		}()
		for _, part := range []*nodev1.FollowResponse{
			{Epoch: "e", To: 5, Snapshot: true, Entries: []*nodev1.Entry{{Id: "1"}}},
			{Epoch: "e", To: 5, Snapshot: true, Entries: []*nodev1.Entry{{Id: "2"}}, Bundles: []*nodev1.Bundle{ca.Bundle()}},
			{Epoch: "e", To: 5, Snapshot: true, Complete: true, Entries: []*nodev1.Entry{{Id: "3"}}},
		} {
			if err := s.Send(part); err != nil {
				return err
			}
		}
		held := int64(5)
		for {
			select {
			case m, ok := <-received:
				switch {
				case !ok:
					return nil
				case m.GetAck() != nil:
					acks <- m.GetAck()
				case m.GetSync() != nil:
					if err := s.Send(&nodev1.FollowResponse{Epoch: "e", From: held, To: held, SyncIds: []uint64{m.GetSync().GetId()}}); err != nil {
						return err
					}
				}
			case m := <-push:
				held = m.GetTo()
				if err := s.Send(m); err != nil {
					return err
				}
			}
		}
	}
	x := run(t, ca)
	if m := wait(t, "the snapshot", x.f.news); len(m.GetEntries()) != 3 || !m.GetComplete() || len(m.GetBundles()) != 1 {
		t.Errorf("the snapshot has %d entries, complete %t, %d bundles", len(m.GetEntries()), m.GetComplete(), len(m.GetBundles()))
	}
	wait(t, "sync", x.synced)
	if !x.client.Connected() {
		t.Error("in sync and not connected")
	}
	push <- &nodev1.FollowResponse{Epoch: "e", From: 5, To: 9, RemovedEntryIds: []string{"1"}}
	for wait(t, "the acknowledgement of 9", acks).GetRevision() != 9 {
	}
	x.client.HandedOn([]string{"a1", "k1"})
	for {
		if a := wait(t, "the authorities handed on", acks); strings.Join(a.GetAuthoritiesHandedOn(), " ") == "a1 k1" && a.GetRevision() == 9 {
			break
		}
	}
	if err := x.client.Sync(t.Context()); err != nil {
		t.Errorf("Sync: %v", err)
	}
}

func TestOutOfStepAsksForASnapshot(t *testing.T) {
	for name, wrong := range map[string]*nodev1.FollowResponse{
		"from is not what is held": {Epoch: "e", From: 7, To: 9},
		"another epoch":            {Epoch: "other", From: 1, To: 2},
		"backwards":                {Epoch: "e", From: 1, To: 0},
	} {
		t.Run(name, func(t *testing.T) {
			ca := faultca.Start(t, "/spire/server")
			hellos := make(chan *nodev1.FollowRequest_Hello, 10)
			first := true
			ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
				hello, err := s.Recv()
				if err != nil {
					return err
				}
				hellos <- hello.GetHello()
				if err := s.Send(&nodev1.FollowResponse{Epoch: "e", To: 1, Snapshot: true, Complete: true}); err != nil {
					return err
				}
				if first {
					first = false
					if err := s.Send(wrong); err != nil {
						return err
					}
				}
				<-s.Context().Done()
				return nil
			}
			x := run(t, ca)
			wait(t, "the first hello", hellos)
			wait(t, "the snapshot", x.f.news)
			if h := wait(t, "the second hello", hellos); h.GetRevision() != 0 || h.GetEpoch() != "" {
				t.Errorf("the second hello holds %q/%d, want a snapshot to be asked for", h.GetEpoch(), h.GetRevision())
			}
			wait(t, "the second snapshot", x.f.news)
			for _, m := range x.f.applied {
				if !m.GetSnapshot() {
					t.Error("differences were applied that do not continue what is held")
				}
			}
		})
	}
}

// A CA that lies, or is broken, changes nothing: what is held stays, and the agent comes back for more.
func TestNonsenseOnFollowChangesNothing(t *testing.T) {
	huge := &nodev1.FollowResponse{Epoch: "e", From: 1, To: 2, Entries: []*nodev1.Entry{{Id: "1", SpiffeId: strings.Repeat("x", maxMessageBytes)}}}
	for name, tt := range map[string]struct {
		send []*nodev1.FollowResponse
		want string
	}{
		"differences inside a snapshot": {[]*nodev1.FollowResponse{{Epoch: "f", To: 9, Snapshot: true}, {Epoch: "e", From: 1, To: 2}}, "before the snapshot"},
		"two snapshots in one":          {[]*nodev1.FollowResponse{{Epoch: "f", To: 9, Snapshot: true}, {Epoch: "f", To: 8, Snapshot: true, Complete: true}}, "mixed parts"},
		"snapshots of two epochs":       {[]*nodev1.FollowResponse{{Epoch: "f", To: 9, Snapshot: true}, {Epoch: "g", To: 9, Snapshot: true, Complete: true}}, "mixed parts"},
		"half a snapshot":               {[]*nodev1.FollowResponse{{Epoch: "f", To: 9, Snapshot: true}}, "ended Follow"},
		"a huge message":                {[]*nodev1.FollowResponse{huge}, "larger than max"},
		"a newer format later":          {[]*nodev1.FollowResponse{{Format: Format + 1, Epoch: "e", From: 1, To: 2}}, "update the agent"},
		"a newer format in a snapshot":  {[]*nodev1.FollowResponse{{Epoch: "f", To: 9, Snapshot: true}, {Format: Format + 1, Epoch: "f", To: 9, Snapshot: true, Complete: true}}, "update the agent"},
	} {
		t.Run(name, func(t *testing.T) {
			ca := faultca.Start(t, "/spire/server")
			hellos := make(chan *nodev1.FollowRequest_Hello, 10)
			lie := true
			ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
				hello, err := s.Recv()
				if err != nil {
					return err
				}
				hellos <- hello.GetHello()
				if !lie {
					<-s.Context().Done()
					return nil
				}
				lie = false
				for _, m := range append([]*nodev1.FollowResponse{{Epoch: "e", To: 1, Snapshot: true, Complete: true}}, tt.send...) {
					if err := s.Send(m); err != nil {
						return err
					}
				}
				return nil
			}
			x := run(t, ca)
			wait(t, "the first hello", hellos)
			wait(t, "the snapshot", x.f.news)
			if h := wait(t, "the second hello", hellos); h.GetEpoch() != "e" || h.GetRevision() != 1 {
				t.Errorf("the second hello holds %q/%d, want e/1", h.GetEpoch(), h.GetRevision())
			}
			if len(x.f.news) != 0 {
				t.Error("nonsense was applied")
			}
			x.client.mu.Lock()
			defer x.client.mu.Unlock()
			if err := x.client.lastErr; err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("the connection ended with %v, want %q", err, tt.want)
			}
		})
	}
}

func TestHelloSaysWhatIsHeldAfterALostConnection(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	hellos := make(chan *nodev1.FollowRequest_Hello, 10)
	ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		hello, err := s.Recv()
		if err != nil {
			return err
		}
		hellos <- hello.GetHello()
		if hello.GetHello().GetRevision() == 0 {
			if err := s.Send(&nodev1.FollowResponse{Epoch: "e", To: 1, Snapshot: true, Complete: true}); err != nil {
				return err
			}
			return status.Error(codes.Unavailable, "the CA shuts down")
		}
		<-s.Context().Done()
		return nil
	}
	run(t, ca)
	wait(t, "the first hello", hellos)
	if h := wait(t, "the second hello", hellos); h.GetRevision() != 1 || h.GetEpoch() != "e" {
		t.Errorf("the second hello holds %q/%d, want e/1", h.GetEpoch(), h.GetRevision())
	}
}

func TestNewerFormatIsNotApplied(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	sent := make(chan struct{}, 100)
	ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		err := s.Send(&nodev1.FollowResponse{Format: Format + 1, Epoch: "e", To: 1, Snapshot: true, Complete: true})
		sent <- struct{}{}
		<-s.Context().Done()
		return err
	}
	x := run(t, ca)
	wait(t, "the first try", sent)
	wait(t, "the second try", sent)
	if _, revision := x.f.Held(); revision != 0 {
		t.Errorf("revision %d was applied from a newer format", revision)
	}
}

func TestDeniedEndsRun(t *testing.T) {
	for reason, want := range map[types.PermissionDeniedDetails_Reason]Reason{
		types.PermissionDeniedDetails_AGENT_BANNED:       Banned,
		types.PermissionDeniedDetails_AGENT_NOT_ATTESTED: NotAttested,
		types.PermissionDeniedDetails_AGENT_NOT_ACTIVE:   NotActive,
	} {
		t.Run(want.String(), func(t *testing.T) {
			ca := faultca.Start(t, "/spire/server")
			ca.Follow = func(nodev1.Node_FollowServer, string) error { return faultca.Denied(reason) }
			x := run(t, ca)
			err := wait(t, "Run's end", x.ended)
			x.ended <- err // for the cleanup
			var denied *DeniedError
			if !errors.As(err, &denied) || denied.Reason != want {
				t.Errorf("Run: %v, want a DeniedError that says %q", err, want)
			}
			if err := x.client.Sync(t.Context()); !errors.Is(err, ErrUnreachable) {
				t.Errorf("Sync after the denial: %v, want ErrUnreachable", err)
			}
		})
	}
}

func TestReconnectUsesTheNewSVID(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	serials := make(chan string, 10)
	ca.Follow = func(s nodev1.Node_FollowServer, serial string) error {
		serials <- serial
		return ca.Answer(s)
	}
	x := run(t, ca)
	first := wait(t, "the first stream", serials)
	wait(t, "sync", x.synced)
	next := agentSVID(t, ca)
	x.mu.Lock()
	x.svid = next
	x.mu.Unlock()
	if _, err := x.client.RenewAgent(t.Context(), nil); !errors.Is(err, ErrUnreachable) {
		t.Errorf("RenewAgent over a connection with the old SVID: %v, want a refusal", err)
	}
	x.client.Reconnect()
	second := wait(t, "the second stream", serials)
	wait(t, "sync", x.synced)
	if want := next.Certificates[0].SerialNumber.String(); second != want || second == first {
		t.Errorf("the second stream came with serial %s after %s, want %s", second, first, want)
	}
}

// TestAnotherNodeBeginsWithASnapshot: an agent that has attested as another node, after an evict or while it was connected,
// must not take differences to what the other one was sent.
func TestAnotherNodeBeginsWithASnapshot(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	hellos := make(chan int64, 10)
	deny := make(chan struct{})
	ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		hello, err := s.Recv()
		if err != nil {
			return err
		}
		hellos <- hello.GetHello().GetRevision()
		if hello.GetHello().GetRevision() == 0 {
			if err := s.Send(&nodev1.FollowResponse{Format: 1, Epoch: "e", To: 7, Snapshot: true, Complete: true}); err != nil {
				return err
			}
		}
		select {
		case <-deny:
			return faultca.Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
		case <-s.Context().Done():
			return nil
		}
	}
	x := run(t, ca)
	become := func(path string) {
		next := agentSVID(t, ca)
		next.ID = spiffeid.RequireFromPath(ca.TrustDomain, path)
		x.mu.Lock()
		x.svid = next
		x.mu.Unlock()
	}
	held := func(what string, want int64) {
		t.Helper()
		if got := wait(t, what, hellos); got != want {
			t.Errorf("%s: the hello holds revision %d, want %d", what, got, want)
		}
		if want == 0 {
			wait(t, "a snapshot", x.f.news)
		}
	}
	held("the first", 0)
	become("/spire/agent/x509pop/other")
	x.client.Reconnect()
	held("another node", 0)
	become("/spire/agent/x509pop/other")
	x.client.Reconnect()
	held("the same node with another SVID", 7)
	deny <- struct{}{}
	if err := wait(t, "the refusal", x.ended); err == nil {
		t.Fatal("Run ended without the refusal")
	}
	become("/spire/agent/x509pop/third")
	ctx, cancel := context.WithCancel(t.Context())
	go func() { x.ended <- x.client.Run(ctx) }()
	held("another node after a refusal", 0)
	cancel()
}

func TestServerMustHaveTheExactID(t *testing.T) {
	for _, path := range []string{"/spire/server2", "/spire/agent/x", "/web"} {
		ca := faultca.Start(t, path)
		token, err := nodeattest.ParseJoinToken(nodeattest.Secret("n1.s." + ca.Pin()))
		if err != nil {
			t.Fatal(err)
		}
		ca.Attest = func(string, *ecdsa.PublicKey) error {
			t.Errorf("the token reached a server with the ID %s", path)
			return nil
		}
		_, err = Attest(t.Context(), Attestation{Address: ca.Addr, TrustDomain: ca.TrustDomain, Evidence: token, Pin: token.PinMatches, CSR: []byte{1}})
		if err == nil || !strings.Contains(err.Error(), "/spire/server") {
			t.Errorf("a server with the ID %s: %v", path, err)
		}
	}
}

func TestPinDecidesWhoGetsTheToken(t *testing.T) {
	ca, other := faultca.Start(t, "/spire/server"), faultca.Start(t, "/spire/server")
	key, err := nodeattest.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	token, err := nodeattest.ParseJoinToken(nodeattest.Secret("n1.s." + ca.Pin()))
	if err != nil {
		t.Fatal(err)
	}
	a := Attestation{Address: ca.Addr, TrustDomain: ca.TrustDomain, Evidence: token, Pin: token.PinMatches, CSR: csr}
	got, err := Attest(t.Context(), a)
	if err != nil || len(got.Chain) != 1 || len(got.Authorities) != 1 {
		t.Fatalf("Attest: %v", err)
	}

	a.Address = other.Addr
	other.Attest = func(string, *ecdsa.PublicKey) error {
		t.Error("the token reached a CA whose authority it does not pin")
		return nil
	}
	if _, err := Attest(t.Context(), a); err == nil || !strings.Contains(err.Error(), "pins") {
		t.Errorf("another CA: %v", err)
	}

	a.Address = ca.Addr
	ca.Lock()
	ca.OtherBundle = []*x509.Certificate{other.Root}
	ca.Unlock()
	if _, err := Attest(t.Context(), a); err == nil || !strings.Contains(err.Error(), "does not contain the authority") {
		t.Errorf("a bundle without the pinned authority: %v", err)
	}

	a.Pin, a.Bundle = nil, x509bundle.FromX509Authorities(ca.TrustDomain, []*x509.Certificate{other.Root})
	if _, err := Attest(t.Context(), a); err == nil {
		t.Error("a CA that the bundle does not verify was accepted")
	}
	a.Bundle = nil
	if _, err := Attest(t.Context(), a); err == nil || !strings.Contains(err.Error(), "nothing verifies the CA") {
		t.Errorf("with neither pin nor bundle: %v", err)
	}
}

func TestIssueHalvesBatchesThatAreTooMuch(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	var mu sync.Mutex
	var sizes []int
	ca.Issue = func(r *nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error) {
		mu.Lock()
		defer mu.Unlock()
		sizes = append(sizes, len(r.GetItems()))
		if len(r.GetItems()) > 130 {
			return nil, status.Error(codes.ResourceExhausted, "too many")
		}
		response := &nodev1.IssueX509SVIDsResponse{}
		for _, item := range r.GetItems() {
			result := &nodev1.IssueX509SVIDsResponse_Result{CertChain: [][]byte{[]byte(item.GetEntryId())}, EntryRevision: 3}
			if item.GetEntryId() == "7" {
				result = &nodev1.IssueX509SVIDsResponse_Result{Code: int32(codes.NotFound), Message: "no such entry"}
			}
			response.Results = append(response.Results, result)
		}
		return response, nil
	}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	items := make([]IssueItem, 600)
	for i := range items {
		items[i] = IssueItem{EntryID: fmt.Sprint(i)}
	}
	results := x.client.IssueX509(t.Context(), items)
	if len(results) != len(items) {
		t.Fatalf("%d results of %d items", len(results), len(items))
	}
	for i, r := range results {
		if i == 7 {
			if status.Code(r.Err) != codes.NotFound {
				t.Errorf("item 7: %v, want NotFound", r.Err)
			}
			continue
		}
		if r.Err != nil || string(r.Chain[0]) != fmt.Sprint(i) || r.EntryRevision != 3 {
			t.Errorf("item %d has the answer %q, %v", i, r.Chain, r.Err)
		}
	}
	if sizes[0] != MaxBatch {
		t.Errorf("the first batch had %d items", sizes[0])
	}
}

// TestSyncsAreCoalescedAndPaced drives an outbox in fake time.
func TestSyncsAreCoalescedAndPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o outbox
		o.init()
		s := &sent{}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- o.run(ctx, s) }()
		began := time.Now()
		for range 500 {
			a, b := o.sync(), o.sync()
			if a != b {
				t.Error("two that come together do not share a request")
			}
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		ids := s.syncs()
		if limit := int(time.Since(began)/syncEvery) + 1; len(ids) > limit || len(ids) < limit/2 {
			t.Errorf("%d requests in %s, want about ten a second", len(ids), time.Since(began))
		}
		// A newcomer never joins a request that was already sent.
		time.Sleep(time.Second)
		first := o.sync()
		synctest.Wait()
		second := o.sync()
		if first == second {
			t.Error("a request that was already sent is shared with a newcomer")
		}
		o.answered(s.syncs())
		if !first.answered() || second.answered() {
			t.Error("the wrong request was answered")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		o.fail(ErrUnreachable)
		if c := o.sync(); c.answered() || !errors.Is(c.err, ErrUnreachable) {
			t.Error("a request after the end does not fail")
		}
	})
}

func TestUnansweredSyncsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o outbox
		o.init()
		done := make(chan error, 1)
		go func() { done <- o.run(t.Context(), &sent{}) }()
		for range maxOpenSyncs + 1 {
			o.sync()
			time.Sleep(2 * syncEvery)
		}
		if err := <-done; err == nil {
			t.Error("a CA that answers nothing is asked without end")
		}
	})
}

// sent is a stream that remembers.
type sent struct {
	nodev1.Node_FollowClient
	mu       sync.Mutex
	requests []*nodev1.FollowRequest
}

func (s *sent) Send(m *nodev1.FollowRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, m)
	return nil
}

func (s *sent) syncs() (ids []uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.requests {
		if m.GetSync() != nil {
			ids = append(ids, m.GetSync().GetId())
		}
	}
	return ids
}

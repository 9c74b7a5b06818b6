package delegated

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

const (
	// maxCalls bounds the open calls of all delegates, and those of one user.
	maxCalls, maxCallsEach = 16384, 8192

	// maxSelectors bounds the selectors of one request.
	maxSelectors = 1024

	// attestingEach and attestingTotal bound the processes that are looked at simultaneously.
	attestingEach, attestingTotal = 32, 256
)

// A Source knows identities, and all bundles of the node. The agent's SVID cache is one.
type Source interface {
	workloadapi.Source

	// WatchBundles sends, in updates without identities, the bundles of our own trust domain and of all that some workload
	// of this node federates with: the present ones at once, then all of them again after each change. It is like Watch in
	// everything else.
	WatchBundles(ctx context.Context) (<-chan workloadapi.Update, error)
}

// Config is what the service needs.
type Config struct {
	// Source and Attestor are the Workload Endpoint's.
	Source   Source
	Attestor workloadapi.Attestor

	// Delegates are the SPIFFE IDs of which a caller must have one. At least one.
	Delegates []spiffeid.ID

	// IssueWait is how long a JWT-SVID of a registered workload, and the delegate's own first SVID, are waited for. Zero
	// means 10 s.
	IssueWait time.Duration

	// Executables looks at what processes run. Nil means this process itself.
	Executables peer.Executables

	// Log gets what operators should know, and a line for each SVID that is handed to a delegate, which names both. Nil
	// means nowhere. Secrets and tokens never go there.
	Log *slog.Logger

	// OnCall, if not nil, is told when a call has ended; OnPush when a stream's message has been sent. They must not block.
	OnCall func(workloadapi.CallEnd)
	OnPush func(method string)
}

// A Service is the Delegated Identity API.
type Service struct {
	delegatedv1.UnimplementedDelegatedIdentityServer
	cfg       Config
	delegates map[spiffeid.ID]bool
	peers     *peer.Table // for processes that delegates name
	gate      *peer.Gate
	calls     *workloadapi.CallLimit[uidKey]
	refusals  *workloadapi.RefusalLog

	// svids and bundles show a workload's identities, and the node's bundles; also when there are no identities (yet).
	svids, bundles *workloadapi.Feed
}

// New returns the service. Whoever has it calls Close when no calls are served any more.
func New(cfg Config) (*Service, error) {
	switch {
	case cfg.Source == nil || cfg.Attestor == nil:
		return nil, errors.New("config of the Delegated Identity API: Source and Attestor are needed")
	case len(cfg.Delegates) == 0:
		return nil, errors.New("config of the Delegated Identity API: Delegates is empty, so that nobody could call it")
	case cfg.IssueWait < 0:
		return nil, fmt.Errorf("config of the Delegated Identity API: IssueWait is %s: must not be negative", cfg.IssueWait)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.IssueWait == 0 {
		cfg.IssueWait = 10 * time.Second
	}
	peers, err := peer.NewTable(peer.Config{Executables: cfg.Executables, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg: cfg, delegates: map[spiffeid.ID]bool{}, peers: peers, gate: peer.NewGate(attestingEach, attestingTotal),
		calls: workloadapi.NewCallLimit[uidKey](maxCalls, maxCallsEach), refusals: workloadapi.NewRefusalLog(cfg.Log),
	}
	feed := workloadapi.Feed{Source: cfg.Source, IssueWait: cfg.IssueWait, BundlesWithoutIdentity: true, Log: cfg.Log, OnPush: cfg.OnPush}
	s.svids = &feed
	ofNode := feed
	ofNode.Source = nodeBundles{cfg.Source}
	s.bundles = &ofNode
	for _, id := range cfg.Delegates {
		s.delegates[id] = true
	}
	return s, nil
}

// Register adds the service to a server whose connections have a peer.Table's credentials.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	delegatedv1.RegisterDelegatedIdentityServer(r, s)
}

// Close gives up what New took.
func (s *Service) Close() error { return s.peers.Close() }

// nodeBundles is a Source of the node's bundles, whoever asks.
type nodeBundles struct{ Source }

func (n nodeBundles) Watch(ctx context.Context, _ workloadapi.Caller) (<-chan workloadapi.Update, error) {
	return n.WatchBundles(ctx)
}

// HandedOn passes on what has been written to a stream.
func (n nodeBundles) HandedOn(watch <-chan workloadapi.Update, revision int64) {
	if ack, ok := n.Source.(workloadapi.Acknowledger); ok {
		ack.HandedOn(watch, revision)
	}
}

// A uidKey is a user whose calls are counted.
type uidKey uint32

func (u uidKey) String() string { return fmt.Sprintf("uid %d", uint32(u)) }

// Conditions of the service. The texts of the first two are SPIRE's, for clients that look at them.
var (
	errNoIdentity      = errors.New("no identity issued")
	errNotDelegate     = errors.New("caller not configured as an authorized delegate")
	errDelegateChanged = errors.New("the calling process is not what it was when the call began: call again")
)

// call lets a delegate's call in, runs it and makes its status. what ends with the delegate's right to call.
func (s *Service) call(ctx context.Context, method string, what func(context.Context, *delegate) error) error {
	start := time.Now()
	p, err := peer.FromContext(ctx)
	if err == nil {
		err = s.serve(ctx, p, what)
	}
	st := toStatus(ctx, err)
	if s.cfg.OnCall != nil {
		s.cfg.OnCall(workloadapi.CallEnd{Method: method, Code: status.Code(st), Duration: time.Since(start)})
	}
	if p != nil {
		s.refusals.Note(ctx, method, status.Code(st), err, slog.Int("pid", int(p.PID)), slog.Uint64("uid", uint64(p.UID)))
	}
	return st
}

func (s *Service) serve(ctx context.Context, p *peer.Process, what func(context.Context, *delegate) error) error {
	if err := s.calls.Take(uidKey(p.UID)); err != nil {
		return err
	}
	defer s.calls.Put(uidKey(p.UID))
	ctx, cancel := context.WithCancelCause(ctx)
	d, err := s.admit(ctx, cancel, p)
	if d != nil {
		defer d.leave()
	}
	defer cancel(nil)
	if err != nil {
		return err
	}
	err = what(ctx, d)
	if cause := context.Cause(ctx); errors.Is(cause, errNotDelegate) || errors.Is(cause, errNoIdentity) {
		return cause
	}
	return err
}

// toStatus is the one place where errors become gRPC codes: those of SPIRE's agent where it has one. An error that is not
// known here leaves without its text.
func toStatus(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNotDelegate):
		return status.Error(codes.PermissionDenied, errNotDelegate.Error())
	case errors.Is(err, errNoIdentity), errors.Is(err, workloadapi.ErrNoIdentity):
		return status.Error(codes.PermissionDenied, errNoIdentity.Error())
	case errors.Is(err, errDelegateChanged):
		return status.Error(codes.Unavailable, errDelegateChanged.Error())
	case errors.Is(err, errNoProcess):
		return status.Error(codes.NotFound, errNoProcess.Error())
	}
	return workloadapi.Status(ctx, err)
}

package broker

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

// An api is the Broker API. [Broker API §5, §6]
type api struct {
	brokerpb.UnimplementedAPIServer
	endpoint *Endpoint
}

// SubscribeToX509SVID streams the workload's X509-SVIDs with their keys and bundles.
func (a *api) SubscribeToX509SVID(req *brokerpb.SubscribeToX509SVIDRequest, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
	if a.endpoint.cfg.DisableX509 {
		return workloadapi.ErrDisabled
	}
	return a.endpoint.follow(ss.Context(), req.GetReference(), brokerpb.API_SubscribeToX509SVID_FullMethodName, func(s *session, u workloadapi.Update) (workloadapi.Message, error) {
		identities, federated, err := workloadapi.X509SVIDs(u)
		if err != nil {
			return workloadapi.Message{}, err
		}
		resp := &brokerpb.SubscribeToX509SVIDResponse{FederatedBundles: federated}
		var ids []string
		for _, i := range identities {
			resp.Svids = append(resp.Svids, &brokerpb.X509SVID{
				SpiffeId: i.ID.String(), X509Svid: i.Chain, X509SvidKey: i.Key, Bundle: u.X509Bundles[i.ID.TrustDomain()], Hint: i.Hint,
			})
			ids = append(ids, i.ID.String())
		}
		m, err := workloadapi.Show(resp, ss)
		return s.recorded(m, "X509-SVIDs", ids), err
	})
}

// SubscribeToX509Bundles streams the X.509 bundles that the workload may have.
func (a *api) SubscribeToX509Bundles(req *brokerpb.SubscribeToX509BundlesRequest, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509BundlesResponse]) error {
	if a.endpoint.cfg.DisableX509 {
		return workloadapi.ErrDisabled
	}
	return a.endpoint.follow(ss.Context(), req.GetReference(), brokerpb.API_SubscribeToX509Bundles_FullMethodName, func(_ *session, u workloadapi.Update) (workloadapi.Message, error) {
		bundles, err := workloadapi.X509Bundles(u)
		if err != nil {
			return workloadapi.Message{}, err
		}
		return workloadapi.Show(&brokerpb.SubscribeToX509BundlesResponse{Bundles: bundles}, ss)
	})
}

// SubscribeToJWTBundles streams the JWT bundles that the workload may have, as plain JWK Sets.
func (a *api) SubscribeToJWTBundles(req *brokerpb.SubscribeToJWTBundlesRequest, ss grpc.ServerStreamingServer[brokerpb.SubscribeToJWTBundlesResponse]) error {
	e := a.endpoint
	if e.cfg.DisableJWT {
		return workloadapi.ErrDisabled
	}
	return e.follow(ss.Context(), req.GetReference(), brokerpb.API_SubscribeToJWTBundles_FullMethodName, func(_ *session, u workloadapi.Update) (workloadapi.Message, error) {
		bundles, err := workloadapi.JWTBundles(u, func(td spiffeid.TrustDomain, err error) {
			e.cfg.Log.LogAttrs(ss.Context(), slog.LevelWarn, "JWT bundle of a foreign trust domain left out", slog.String("trust_domain", td.Name()), slog.Any("err", err))
		})
		if err != nil {
			return workloadapi.Message{}, err
		}
		return workloadapi.Show(&brokerpb.SubscribeToJWTBundlesResponse{Bundles: bundles}, ss)
	})
}

// FetchJWTSVID returns a JWT-SVID for each of the workload's identities or for the one asked for.
func (a *api) FetchJWTSVID(ctx context.Context, req *brokerpb.FetchJWTSVIDRequest) (*brokerpb.FetchJWTSVIDResponse, error) {
	e := a.endpoint
	if e.cfg.DisableJWT {
		return nil, workloadapi.ErrDisabled
	}
	s, err := e.open(ctx, req.GetReference())
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if err := workloadapi.CheckAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	var id spiffeid.ID
	if req.GetSpiffeId() != "" {
		if id, err = spiffe.ParseWorkloadID(req.GetSpiffeId()); err != nil {
			return nil, &workloadapi.ArgumentError{Text: fmt.Sprintf("spiffe_id: %v", err)}
		}
		if !s.caller.mayGet(id) {
			return nil, s.failed(workloadapi.ErrNoIdentity)
		}
	}
	if audience, ok := s.caller.mayAsk(req.GetAudience()); !ok {
		return nil, notAllowed("this broker may not ask for JWT-SVIDs for the audience %s: see audiences in the agent's configuration", quoted(audience))
	}
	var resp *brokerpb.FetchJWTSVIDResponse
	var ids []string
	err = e.feed.Answer(ctx, s, func(workload workloadapi.Caller) error {
		svids, err := e.cfg.Source.FetchJWTSVIDs(ctx, workload, id, req.GetAudience())
		if err != nil {
			return fmt.Errorf("JWT-SVIDs for the workload: %w", err)
		}
		resp, ids = &brokerpb.FetchJWTSVIDResponse{}, nil
		for _, svid := range workloadapi.DistinctJWTSVIDs(workloadapi.JWTForSpeaker(svids, s.caller.mayGet)) {
			if svid.ID.IsZero() || svid.Token == "" || (!id.IsZero() && svid.ID != id) {
				return fmt.Errorf("the source returned an unusable JWT-SVID for %q", svid.ID)
			}
			resp.Svids = append(resp.Svids, &brokerpb.JWTSVID{SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: svid.Hint})
			ids = append(ids, svid.ID.String())
		}
		if len(resp.Svids) == 0 {
			return workloadapi.ErrNoIdentity
		}
		return nil
	})
	if err != nil {
		return nil, s.failed(err)
	}
	s.record("JWT-SVIDs", ids)
	return resp, nil
}

// A session is one call of a broker for one workload.
type session struct {
	workload
	endpoint *Endpoint
	caller   caller
	ref      reference
}

// A workload is what a reference was resolved to.
type workload interface {
	workloadapi.Subject
	Close()
}

// open resolves the reference of a call, if its broker may use it.
func (e *Endpoint) open(ctx context.Context, w *brokerpb.WorkloadReference) (*session, error) {
	ref, err := parseReference(w)
	if err != nil {
		return nil, err
	}
	s := &session{endpoint: e, caller: callerFrom(ctx), ref: ref}
	if err := s.mayRefer(); err != nil {
		return nil, err
	}
	if ref.pod != nil {
		s.workload, err = findPod(ctx, e.cfg.Pods, *ref.pod, e.cfg.Log)
	} else {
		s.workload, err = workloadapi.FindProcess(ref.pid, e.peers, e.cfg.Attestor, e.gate)
	}
	if err != nil {
		return nil, s.failed(err)
	}
	return s, nil
}

// mayRefer says whether the broker may name a workload in this way, over this connection.
func (s *session) mayRefer() error {
	kind := s.ref.kind()
	if kind == Kubernetes && s.endpoint.cfg.Pods == nil {
		return badReference("reference.type_url", "Kubernetes objects are not understood here: the agent has no k8s attestor") // DEC-15
	}
	if !s.caller.mayUse(kind) {
		return notAllowed("this broker may not use references of type %s: see references in the agent's configuration", kind)
	}
	if kind == PID && s.caller.conn.origin != unixSocket {
		// A process id says nothing on another node, and would name somebody else there. [Broker API §3.1.2]
		if s.caller.conn.origin != loopback {
			return notAllowed("process ids are of this node alone: connect to the agent's Unix socket")
		}
		if !s.caller.PIDOverLoopback {
			return notAllowed("this broker may not use process ids over TCP: connect to the agent's Unix socket, or see pid_over_loopback in the agent's configuration")
		}
	}
	if ns := s.caller.Namespaces; kind == Kubernetes && len(ns) > 0 && s.ref.pod.Namespace == "" {
		return notAllowed("this broker may name pods of certain namespaces only: give the pod's namespace and name beside its UID")
	} else if kind == Kubernetes && len(ns) > 0 && !slices.Contains(ns, s.ref.pod.Namespace) {
		return notAllowed("this broker may not name pods of namespace %s: see namespaces in the agent's configuration", quoted(s.ref.pod.Namespace))
	}
	return nil
}

// Check says whether the broker may still have an answer, and whether the workload is what it was.
func (s *session) Check(ctx context.Context, c workloadapi.Caller) error {
	if err := s.endpoint.identify(s.caller.conn); err != nil {
		return err
	}
	return s.workload.Check(ctx, c)
}

// failed says which workload an error is about.
func (s *session) failed(err error) error { return &workloadError{err, s.ref} }

// follow serves a stream for the workload that w names.
func (e *Endpoint) follow(ctx context.Context, w *brokerpb.WorkloadReference, method string, render func(*session, workloadapi.Update) (workloadapi.Message, error)) error {
	s, err := e.open(ctx, w)
	if err != nil {
		return err
	}
	defer s.Close()
	err = e.feed.Follow(ctx, s, workloadapi.Stream{
		Method: method, Spread: true, Narrow: s.caller.narrow,
		Render: func(u workloadapi.Update) (workloadapi.Message, error) { return render(s, u) },
	})
	if err == nil {
		return nil
	}
	return s.failed(err)
}

// recorded is a message whose sending is written down, before it leaves.
func (s *session) recorded(m workloadapi.Message, what string, ids []string) workloadapi.Message {
	send := m.Send
	m.Send = func() error {
		s.record(what, ids)
		return send()
	}
	return m
}

// record writes down what a broker was given, and on behalf of whom. It is never left out.
func (s *session) record(what string, ids []string) {
	metadata := map[string]string{}
	s.endpoint.cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, what+" handed to a broker", slog.String("broker", s.caller.ID.String()),
		slog.String("spiffe_id", strings.Join(ids, " ")), slog.String("workload", s.ref.describe(metadata)))
}

// narrow leaves of an update what the broker may get.
func (b *Broker) narrow(u workloadapi.Update) workloadapi.Update {
	return workloadapi.ForSpeaker(u, b.mayGet)
}

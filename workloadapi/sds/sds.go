// Package sds is Envoy's secret discovery service, version 3, on the Workload Endpoint: it hands an Envoy the X509-SVIDs
// and the validation contexts of its own identities, and new ones as soon as there are any.
//
// Callers are attested, followed and looked at again before each push by the same code that serves the Workload API
// (workloadapi.Server.Follow); here is only what is Envoy's: the names of resources, their form, and the two protocols
// by which they are asked for. Nothing is kept beyond a stream.
package sds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/workloadapi"
)

// Config says how resources are named. The zero value is what Envoys that were configured for SPIRE expect.
type Config struct {
	// DefaultSVIDName is the resource with the caller's default X509-SVID. Empty means "default".
	DefaultSVIDName string

	// DefaultBundleName is the validation context of our own trust domain. Empty means "ROOTCA".
	DefaultBundleName string

	// DefaultAllBundlesName is the validation context of all trust domains that the caller may know. Empty means "ALL".
	DefaultAllBundlesName string

	// DisableSPIFFECertValidation gives every Envoy plain validation contexts, which cannot hold two trust domains apart:
	// DefaultAllBundlesName then names nothing.
	DisableSPIFFECertValidation bool

	// Log gets what Envoys refuse. Nil means nowhere.
	Log *slog.Logger

	// OnReject, if not nil, is told that an Envoy has refused a response. It must not block.
	OnReject func()
}

// Check fills in defaults and refuses names that cannot work.
func (c *Config) Check() error {
	names := []struct {
		field string
		value *string
		usual string
	}{
		{"default_svid_name", &c.DefaultSVIDName, "default"},
		{"default_bundle_name", &c.DefaultBundleName, "ROOTCA"},
		{"default_all_bundles_name", &c.DefaultAllBundlesName, "ALL"},
	}
	taken := map[string]string{}
	var errs []error
	for _, n := range names {
		if *n.value == "" {
			*n.value = n.usual
		}
		switch other := taken[*n.value]; {
		case *n.value == wildcard || strings.HasPrefix(*n.value, "spiffe:"):
			errs = append(errs, fmt.Errorf("%s: %q names something else already; choose a plain word such as %s", n.field, *n.value, n.usual))
		case len(*n.value) > maxNameBytes:
			errs = append(errs, fmt.Errorf("%s: a name of %d bytes is longer than %d", n.field, len(*n.value), maxNameBytes))
		case other != "":
			errs = append(errs, fmt.Errorf("%s: %q is the %s too; give each a name of its own", n.field, *n.value, other))
		}
		taken[*n.value] = n.field
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// Service returns what workloadapi.Config.Services takes.
func Service(c Config) (func(grpc.ServiceRegistrar, *workloadapi.Server), error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	return func(r grpc.ServiceRegistrar, server *workloadapi.Server) {
		secretv3.RegisterSecretDiscoveryServiceServer(r, &service{cfg: c, server: server, rejections: newRejections(c.Log, c.OnReject)})
	}, nil
}

// A service is envoy.service.secret.v3.SecretDiscoveryService.
type service struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	cfg        Config
	server     *workloadapi.Server
	rejections *rejections
}

// StreamSecrets is the state-of-the-world protocol: each response has all that is subscribed to.
func (s *service) StreamSecrets(ss grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	return follow(s, ss, secretv3.SecretDiscoveryService_StreamSecrets_FullMethodName, &stateOfTheWorld{})
}

// DeltaSecrets is the incremental protocol: each response has what is new, changed or gone.
func (s *service) DeltaSecrets(ss grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	return follow(s, ss, secretv3.SecretDiscoveryService_DeltaSecrets_FullMethodName, &delta{})
}

// FetchSecrets answers once. A resource that is not the caller's, or not anybody's, is left out; the two look the same.
func (s *service) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	var resp *discoveryv3.DiscoveryResponse
	err := s.server.Answer(ctx, func(caller workloadapi.Caller) error {
		u, err := s.server.Current(ctx, caller)
		if err != nil {
			return err
		}
		once := &stateOfTheWorld{}
		if _, err := once.request(req); err != nil {
			return err
		}
		resp, err = once.respond(s.offer(u, nodeOf(req.GetNode())))
		return err
	})
	if err != nil {
		return nil, err
	}
	if resp == nil {
		return nil, status.Errorf(codes.NotFound, "none of the resources %s is this process's", printable(strings.Join(req.GetResourceNames(), ", ")))
	}
	return resp, nil
}

// A protocol keeps account of what a stream's client wants and has. Req and Resp are the messages of a stream.
type protocol[Req, Resp any] interface {
	// request takes in a message of the client. refused is the client's complaint about the last response, or nil.
	request(*Req) (refused *refusal, err error)

	// respond returns the message that is due, or nil if none is.
	respond(*offer) (*Resp, error)

	// client is what the client's first message said about it.
	client() node
}

// maxAsked is how many requests of a stream wait until they are looked at; then the client waits.
const maxAsked = 16

// follow serves a stream until it ends. One goroutine receives requests, another one takes them in and pushes; each waits for
// nobody but the network, and the last word of both counts.
func follow[Req, Resp any](s *service, ss grpc.BidiStreamingServer[Req, Resp], method string, p protocol[Req, Resp]) error {
	ctx, end := context.WithCancelCause(ss.Context())
	defer end(nil)
	asked := make(chan *Req, maxAsked)
	again := make(chan struct{}, 1)

	// It ends with the stream's context, which the return of this function cancels.
	go func() {
		for {
			req, err := ss.Recv()
			if err != nil {
				end(err)
				return
			}
			select {
			case asked <- req:
			case <-ctx.Done():
				return
			}
			select {
			case again <- struct{}{}:
			default: // it will look anyway
			}
		}
	}()

	return ended(ctx, s.server.Follow(ctx, workloadapi.Stream{
		Method: method,
		Spread: true,
		Again:  again,
		Ask: func() error {
			for range maxAsked { // whatever comes meanwhile says so anew
				select {
				case req := <-asked:
					refused, err := p.request(req)
					if err != nil {
						return err
					}
					if refused != nil {
						s.rejections.note(ctx, method, *refused)
					}
				default:
					return nil
				}
			}
			return nil
		},
		Render: func(u workloadapi.Update) (workloadapi.Message, error) {
			resp, err := p.respond(s.offer(u, p.client()))
			if err != nil || resp == nil {
				return workloadapi.Message{}, err
			}
			return workloadapi.Show(resp, ss)
		},
	}))
}

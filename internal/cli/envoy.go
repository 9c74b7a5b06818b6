package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/spiffe"
)

func (a *app) envoyCommand() *cobra.Command {
	return a.noun("envoy", "Envoys that get their identity from the agent", "", a.envoyConfigCommand(), a.envoyRBACCommand())
}

const defaultEndpoint = "unix:///run/signet/agent.sock"

func (a *app) envoyConfigCommand() *cobra.Command {
	var service, trustDomain, endpoint, listen, local, all, protocol string
	var allow, upstreams []string
	var withoutPolicies bool
	var maxConnection time.Duration
	cmd := &cobra.Command{
		Use:   "config --service ID",
		Short: "Print a bootstrap for an Envoy beside a service",
		Long: `Print a bootstrap for an Envoy beside a service, complete enough to run: it gets the service's X509-SVID and the bundles
from the agent (SDS), takes mTLS connections for the service, of which it lets through what the service's call policies allow, by
asking the agent (ext_authz), and opens mTLS connections to each --upstream, whose ID it verifies.

With --protocol http or grpc each request is decided, else each connection. Whoever calls shows an X509-SVID of an ID that --allow
names, by default of the service's own trust domain; callers of other trust domains are named there.

The registration entry of the service must match the Envoy: it is the Envoy that asks the agent. An ID written as a path is of the
trust domain of --service, for which --trust-domain or the agent says which it is.`,
		Example: `  signet envoy config --service spiffe://example.org/web --protocol http > envoy.yaml
  signet envoy config --service /web --trust-domain example.org --allow '/ns/shop/**' --local 127.0.0.1:8080 \
    --upstream 127.0.0.1:15432=/db@db.internal:8443`,
	}
	fs := cmd.Flags()
	fs.StringVar(&service, "service", "", "SPIFFE ID of the service, or its path")
	fs.StringVar(&trustDomain, "trust-domain", "", "trust domain of IDs that are written as paths (default: asked of the agent)")
	fs.StringArrayVar(&allow, "allow", nil, "who may connect at all: an ID, or one that ends in /** for all below it (repeatable; default /**, the own trust domain)")
	fs.StringVar(&protocol, "protocol", "tcp", "what the service speaks behind mTLS: tcp, http or grpc")
	fs.BoolVar(&withoutPolicies, "without-policies", false, "do not ask the agent: whoever --allow names may do everything")
	fs.DurationVar(&maxConnection, "max-connection", time.Hour, "how long a connection lasts at most: an Envoy does not close those that a policy or a revocation has come to forbid")
	fs.StringVar(&listen, "listen", "0.0.0.0:8443", "where callers connect")
	fs.StringVar(&local, "local", "127.0.0.1:8080", "where the service listens, without TLS")
	fs.StringArrayVar(&upstreams, "upstream", nil, "LISTEN=ID@HOST:PORT: what the service sends to LISTEN, such as 127.0.0.1:15432, goes by mTLS to ID at HOST:PORT (repeatable)")
	fs.StringVar(&all, "all-bundles-name", "ALL", "the agent's sds.default_all_bundles_name")
	fs.StringVar(&endpoint, "endpoint", "", "the agent's socket (default $"+envEndpoint+", else "+defaultEndpoint+")")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		network, socket, err := spiffe.ParseEndpoint(cmp.Or(endpoint, os.Getenv(envEndpoint), defaultEndpoint))
		if err == nil && network != "unix" {
			err = fmt.Errorf("the endpoint %q is no Unix socket", endpoint)
		}
		if err != nil {
			return &usageError{err: err, hint: "--endpoint, or $" + envEndpoint + ", is such as " + defaultEndpoint}
		}
		switch {
		case service == "":
			return &usageError{err: errors.New("--service is missing: whose SVID the Envoy uses"), hint: example(cmd)}
		case withoutPolicies && len(allow) == 0:
			return &usageError{err: errors.New("--allow is missing: without policies it alone says who may call; --allow '/**' is everybody in the trust domain"), hint: example(cmd)}
		case protocol != "tcp" && protocol != "http" && protocol != "grpc":
			return usagef("--protocol is %q; it is tcp, http or grpc", protocol)
		case maxConnection < time.Second:
			return usagef("--max-connection is %v; it is at least 1s", maxConnection)
		case len(allow) == 0:
			allow = []string{"/**"}
		}
		b := envoyBootstrap{Socket: socket, Protocol: protocol, Policies: !withoutPolicies, MaxConnection: fmt.Sprintf("%ds", maxConnection/time.Second)}
		if b.Service, err = envoyService(cmd.Context(), service, trustDomain, socket); err != nil {
			return err
		}
		td := b.Service.TrustDomain()
		tds := []spiffeid.TrustDomain{}
		for _, s := range allow {
			m, peer, err := envoyMatcher(td, s)
			if err != nil {
				return err
			}
			b.Allow = append(b.Allow, m)
			tds = append(tds, peer)
		}
		slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
		if b.Context = tds[0].IDString(); len(slices.Compact(tds)) > 1 {
			b.Context = all
		}
		if b.Listen, err = envoyAddress("--listen", listen); err != nil {
			return err
		}
		if b.Local, err = envoyAddress("--local", local); err != nil {
			return err
		}
		for i, s := range upstreams {
			u, err := envoyUpstreamOf(td, s)
			if err != nil {
				return err
			}
			u.Name = fmt.Sprintf("upstream_%d", i+1)
			b.Upstreams = append(b.Upstreams, u)
		}
		text, err := b.render()
		if err != nil {
			return err
		}
		_, err = a.stdout.Write(text)
		return err
	}
	return cmd
}

// envoyService finds out the whole ID of the service.
func envoyService(ctx context.Context, service, trustDomain, socket string) (spiffeid.ID, error) {
	if !strings.HasPrefix(service, "/") {
		return fullID("--service", service)
	}
	if trustDomain != "" {
		td, err := spiffe.ParseTrustDomain(trustDomain)
		if err != nil {
			return spiffeid.ID{}, usagef("--trust-domain: %w", err)
		}
		return fullID("--service", td.IDString()+service)
	}
	const patience = 3 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return spiffeid.ID{}, &usageError{err: fmt.Errorf("--service %s is without a trust domain, and the agent does not say which is its: %w", escape(service), err),
			hint: "write the ID out, such as --service spiffe://example.org" + escape(service) + ", or give --trust-domain"}
	}
	return fullID("--service", svid.ID.TrustDomain().IDString()+service)
}

// An envoyMatch is one of Envoy's string matchers.
type envoyMatch struct {
	Kind  string // exact or prefix
	Value string
}

// envoyMatcher turns an ID, or one that ends in /**, into a matcher.
func envoyMatcher(td spiffeid.TrustDomain, s string) (envoyMatch, spiffeid.TrustDomain, error) {
	full := s
	if strings.HasPrefix(s, "/") {
		full = td.IDString() + s
	}
	below, all := strings.CutSuffix(full, "/**")
	if !all {
		id, err := fullID("--allow", full)
		return envoyMatch{Kind: "exact", Value: id.String()}, id.TrustDomain(), err
	}
	id, err := spiffe.ParseID(below)
	if err != nil {
		return envoyMatch{}, td, &usageError{err: fmt.Errorf("--allow %s: %w", escape(s), err), hint: "such as /web, /ns/shop/** or spiffe://partner.example/reports"}
	}
	return envoyMatch{Kind: "prefix", Value: id.String() + "/"}, id.TrustDomain(), nil
}

// An envoyUpstream is a service that the one behind the Envoy calls.
type envoyUpstream struct {
	Name           string
	Listen, Remote envoyEndpoint
	ID             spiffeid.ID
}

func envoyUpstreamOf(td spiffeid.TrustDomain, s string) (u envoyUpstream, err error) {
	bad := func(err error) error {
		return &usageError{err: fmt.Errorf("--upstream %s: %w", escape(s), err), hint: "it is LISTEN=ID@HOST:PORT, such as 127.0.0.1:15432=/db@db.internal:8443"}
	}
	listen, rest, ok := strings.Cut(s, "=")
	at := strings.LastIndexByte(rest, '@')
	if !ok || at < 0 {
		return u, bad(fmt.Errorf("there is no = or no @"))
	}
	id := rest[:at]
	if strings.HasPrefix(id, "/") {
		id = td.IDString() + id
	}
	if u.ID, err = spiffe.ParseWorkloadID(id); err != nil {
		return u, bad(err)
	}
	if u.Listen, err = envoyAddress("--upstream", listen); err != nil {
		return u, err
	}
	u.Remote, err = envoyAddress("--upstream", rest[at+1:])
	return u, err
}

// An envoyEndpoint is host and port, which Envoy wants apart.
type envoyEndpoint struct {
	Host string
	Port int
}

func envoyAddress(flag, s string) (envoyEndpoint, error) {
	host, port, err := net.SplitHostPort(s)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || host == "" || perr != nil || n == 0 || strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return envoyEndpoint{}, usagef("%s: %q is not host:port, such as 127.0.0.1:8080", flag, s)
	}
	return envoyEndpoint{Host: host, Port: int(n)}, nil
}

// IsName tells a host name, which Envoy has to look up, from an address.
func (e envoyEndpoint) IsName() bool { return net.ParseIP(e.Host) == nil }

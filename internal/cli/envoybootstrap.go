package cli

import (
	"bytes"
	"strconv"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An envoyBootstrap is what a bootstrap is made of.
type envoyBootstrap struct {
	Service       spiffeid.ID
	Socket        string
	Context       string // the validation context for callers
	Allow         []envoyMatch
	Listen, Local envoyEndpoint
	Upstreams     []envoyUpstream

	Protocol      string // of the service: tcp, http or grpc
	Policies      bool   // the agent is asked about each call or connection
	MaxConnection string // how long a connection lasts at most, in seconds as protobuf writes them
}

func (b envoyBootstrap) render() ([]byte, error) {
	var out bytes.Buffer
	err := envoyTemplate.Execute(&out, b)
	return out.Bytes(), err
}

// envoyTemplate writes every value that comes from elsewhere as a quoted string, of which YAML takes each that JSON does.
var envoyTemplate = template.Must(template.New("bootstrap").Funcs(template.FuncMap{"q": strconv.QuoteToASCII}).Parse(`# An Envoy beside {{.Service}}, by signet envoy config.
# Its certificate and the bundles come from the agent, which finds out by itself who this Envoy is: a registration entry
# must give {{.Service}} to the process.
node:
  id: {{q .Service.String}}
  cluster: {{q .Service.Path}}
static_resources:
  listeners:
  # Callers come in here, each with an X509-SVID that is verified in the handshake, where who is not named below is refused.
  - name: inbound
    address: {socket_address: {address: {{q .Listen.Host}}, port_value: {{.Listen.Port}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          # A session that is resumed would not be asked again who it is.
          disable_stateless_session_resumption: true
          disable_stateful_session_resumption: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_2}
            {{- if eq .Protocol "http"}}
            alpn_protocols: [h2, http/1.1]
            {{- else if eq .Protocol "grpc"}}
            alpn_protocols: [h2]
            {{- end}}
            tls_certificate_sds_secret_configs:
            - {{template "secret" q .Service.String}}
            combined_validation_context:
              default_validation_context:
                match_typed_subject_alt_names:{{range .Allow}}
                - {san_type: URI, matcher: { {{- .Kind}}: {{q .Value}}}}{{end}}
              validation_context_sds_secret_config:
                {{template "secret" q .Context}}
      filters:
{{- if eq .Protocol "tcp"}}
      {{- if .Policies}}
      # The call policies of {{.Service}} decide about each connection. Without an answer nobody gets in.
      - name: envoy.filters.network.ext_authz
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.ext_authz.v3.ExtAuthz
          stat_prefix: signet
          transport_api_version: V3
          failure_mode_allow: false
          include_peer_certificate: true
          grpc_service: {{template "agent"}}
      {{- end}}
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: inbound
          cluster: local_service
          # Nobody asks again about a connection that is open.
          max_downstream_connection_duration: {{.MaxConnection}}
{{- else}}
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: inbound
          codec_type: {{if eq .Protocol "grpc"}}HTTP2{{else}}AUTO{{end}}
          use_remote_address: true
          # What is judged is what the service sees: paths go through as they came, and the odd ones are refused by the policies.
          normalize_path: false
          merge_slashes: false
          path_with_escaped_slashes_action: KEEP_UNCHANGED
          common_http_protocol_options:
            headers_with_underscores_action: REJECT_REQUEST
            max_connection_duration: {{.MaxConnection}}
          # The service learns who calls from x-forwarded-client-cert, of which nothing is the caller's own word.
          forward_client_cert_details: SANITIZE_SET
          set_current_client_cert_details: {uri: true}
          route_config:
            name: inbound
            virtual_hosts:
            - name: local_service
              domains: ["*"]
              routes:
              - match: {prefix: "/"}
                route: {cluster: local_service, timeout: 0s}
          http_filters:
          {{- if .Policies}}
          # The call policies of {{.Service}} decide about each call. Without an answer none gets through.
          - name: envoy.filters.http.ext_authz
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
              transport_api_version: V3
              failure_mode_allow: false
              status_on_error: {code: Forbidden}
              include_peer_certificate: true
              encode_raw_headers: true
              grpc_service: {{template "agent"}}
          {{- end}}
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
{{- end}}
{{- range .Upstreams}}
  # What the service sends here goes to {{.ID}}.
  - name: {{.Name}}
    address: {socket_address: {address: {{q .Listen.Host}}, port_value: {{.Listen.Port}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: {{.Name}}
          cluster: {{.Name}}
{{- end}}
  clusters:
  - name: local_service
    type: {{if .Local.IsName}}STRICT_DNS{{else}}STATIC{{end}}
    connect_timeout: 5s
    {{- if eq .Protocol "grpc"}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    {{- end}}
    load_assignment:
      cluster_name: local_service
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: {{q .Local.Host}}, port_value: {{.Local.Port}}}}}
{{- $service := .Service.String}}
{{- range .Upstreams}}
  - name: {{.Name}}
    type: {{if .Remote.IsName}}STRICT_DNS{{else}}STATIC{{end}}
    connect_timeout: 5s
    load_assignment:
      cluster_name: {{.Name}}
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: {{q .Remote.Host}}, port_value: {{.Remote.Port}}}}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_params: {tls_minimum_protocol_version: TLSv1_2}
          tls_certificate_sds_secret_configs:
          - {{template "secret" q $service}}
          combined_validation_context:
            default_validation_context:
              match_typed_subject_alt_names:
              - {san_type: URI, matcher: {exact: {{q .ID.String}}}}
            validation_context_sds_secret_config:
              {{template "secret" q .ID.TrustDomain.IDString}}
{{- end}}
  # The agent of this node.
  - name: signet_agent
    type: STATIC
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: signet_agent
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {pipe: {path: {{q .Socket}}}}}
{{- define "agent"}}{envoy_grpc: {cluster_name: signet_agent}, timeout: 1s}{{end}}
{{- define "secret"}}{name: {{.}}, sds_config: {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: signet_agent}}]}}}{{end}}
`))

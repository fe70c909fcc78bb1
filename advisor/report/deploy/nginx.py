"""The load balancer's configuration."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.report.deploy.files import DRAIN_S, File, shown

# No number of vLLM's: what a prompt of the longest context and a few images take as JSON.
_BODY = "64m"
# vLLM closes a connection that was idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). The balancer has to let go of it
# earlier: a request sent into a closing connection is lost, and never sent twice.
_IDLE_S = 4


def nginx_file(
    *, listen: str, port: int, servers: Sequence[str], workers: int, run: str, log: str, foreground: bool = False
) -> File:
    """nginx.conf for `servers` ("host:port"), with `workers` processes. What nginx writes lies in `run`, its messages
    go to `log` (relative: to the prefix it is started with).
    """
    upstream = "\n".join(f"    server {server} max_fails=2 fail_timeout=5s;" for server in servers)
    text = f"""\
# Written by mps-advisor deploy: one balancer before {len(servers)} engines.
worker_processes {workers};
pid {run}/nginx.pid;
error_log {log} warn;
daemon {"off" if foreground else "on"};
worker_shutdown_timeout {DRAIN_S}s;

events {{
  worker_connections 4096;
}}

http {{
  access_log off;
  client_body_temp_path {run}/body;
  proxy_temp_path {run}/proxy;
  fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi;
  scgi_temp_path {run}/scgi;

  upstream engines {{
    # Shared by all workers; without it each counts only its own requests.
    zone engines 64k;
    # The engine with the fewest requests, as while measuring.
    least_conn;
{upstream}
    keepalive 256;
    keepalive_requests 100000;
    # Less than vLLM's own 5 s, or requests meet a connection that just closes.
    keepalive_timeout {_IDLE_S}s;
  }}

  server {{
    listen {shown(listen)}:{port} backlog=4096;
    keepalive_requests 100000;
    client_max_body_size {_BODY};
    # Whole in memory: prompts never wait for a disk.
    client_body_buffer_size {_BODY};

    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      # Tokens go on as they come.
      proxy_buffering off;
      proxy_cache off;
      # An engine that cannot be reached is passed by. A request that was sent to
      # one (they are POSTs) is never sent again, and a stream never repeated.
      proxy_next_upstream error;
      proxy_connect_timeout 5s;
      # Without a stream nothing comes before the last token.
      proxy_send_timeout 3600s;
      proxy_read_timeout 3600s;
    }}

    # Of one engine, and nobody would know which: ask each at its own port.
    location = /metrics {{
      default_type text/plain;
      return 404 "each engine has metrics of its own: ask the engines, not the balancer\\n";
    }}
  }}
}}
"""
    return File(name="nginx.conf", text=text)
